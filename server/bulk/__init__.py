"""`python -m server.bulk`: archives of photos, without HTTP: masks and a table, on one or many
machines.

    sources    which photos there are, and where their masks go
    ledger     what is done: survives a kill at any moment, and becomes the table
    segmenter  a photo's file → its mask's file and its row of the table
    local      all of it on this machine
    cluster    all of it on a Ray cluster
    progress   what a person sees meanwhile
"""
