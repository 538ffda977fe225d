"""Serves a bundle over HTTP; needs the extra `serve`, and nothing that training needs."""
