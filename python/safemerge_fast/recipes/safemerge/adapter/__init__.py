"""A merge whose output is an adapter again: layout, tensors, files and their verification."""
