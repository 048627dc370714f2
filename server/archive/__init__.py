"""`python -m server.archive`: between DICOM archives and the server, as a process of its own.

    receiver   takes photos by C-STORE
    journal    what was taken and is not delivered yet: survives a kill at any moment
    segmenting photo → results, by the server over HTTP
    dicomweb   finds, fetches and stores objects of an archive, over HTTP
    sending    stores objects by C-STORE
    relay      takes each photo through these steps, and again after failures
    health     the port for health and metrics

The journal is the one place where photos of patients lie on disk: the server itself keeps none.
"""
