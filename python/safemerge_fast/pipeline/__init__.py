"""The stages in a row: what was asked for, the work, and its verification."""
