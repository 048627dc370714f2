"""`python -m server.bulk`: folders of photos, without HTTP: masks and a table, on one or many
machines.

    sources    the photos, and where their masks go
    ledger     the photos that are done: survives a kill at any moment, and becomes the table
    segmenter  a photo's file → its mask's file and its row of the table
    local      the work on this machine
    cluster    the work on a Ray cluster
"""
