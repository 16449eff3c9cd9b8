"""`python -m bench gpu`, see `runner`."""
