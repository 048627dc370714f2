"""Processes of their own for files that the server's process does not parse itself.

The server's side is `parent`, the other one `child`. On Linux `template` forks them.
"""
