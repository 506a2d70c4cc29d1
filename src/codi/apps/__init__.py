"""The shell commands and the pages they write. Imports every other subpackage; none imports this one."""
