"""From raw files to batches, in the order that the data flows:

sources -> clean -> split -> tokenizer / chat -> shards -> packing -> loader

`prepare` runs the first five and writes a folder; `PreparedData` reads it; `Sequences` and
`Loader` turn it into batches. Formats: docs/data.md.
"""
