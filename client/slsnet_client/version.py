"""The client's version: that of the server it is released with."""

VERSION = "0.1.0"
