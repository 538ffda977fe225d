"""What Polars and plain Python must read alike: white space, and the largest numbers; imports nothing heavy."""

from __future__ import annotations

WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""The characters with the Unicode property White_Space."""
LARGEST = 3.4028234663852886e38
"""The largest float32: what it cannot hold would be infinite as soon as it reaches the model."""
EXACT = {"Float16": 2.0**11, "Float32": 2.0**24}
"""Float type → the first whole number that others are rounded to; 2^53 for the rest."""
EXACT_DOUBLE = 2.0**53
