"""The committed byte-pair vocabulary of the `:tiny` and `:emoji` runs, in CLIP's file format.

`vocab.json` maps symbols to ids: 256 bytes, the same 256 ending a word (`</w>`), one symbol per merge, then
`<|startoftext|>` and `<|endoftext|>`; `merges.txt` lists the merges, most frequent first. `training.py` made them.
The files are committed because byte-pair training breaks ties differently from run to run, so the ids cannot be
made again.
"""
