"""What knows no graph: errors, the one writer of files, text and tables, what is borrowed and patched."""
