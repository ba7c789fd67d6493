"""Readers of foreign files, one module per format: each gives robopref's own types, with labels in its convention."""
