"""Helpers of every command: atomic files, CSV cells, help, progress, the stamp of a network file.

They are hand-written because each is a few lines, and no library that serving installs has them.
"""
