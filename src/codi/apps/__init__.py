"""What people touch: the shell commands and the pages they write. Imports every room; no room imports it."""
