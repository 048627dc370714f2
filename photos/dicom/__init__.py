"""DICOM in and out: what archives of hospitals keep, and what they take back.

`process` runs the other modules, each object in a process of its own: pydicom parses whatever it is
given, and the decoders of compressed pixels are large and written in C and C++.
"""
