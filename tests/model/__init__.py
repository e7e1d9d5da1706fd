"""
A model of the flag protocol, small enough to look at every state it can reach.

`search` is the engine, `flagrow` the ledger's row (its edges are `shardmig.states.EDGES`); `world`, `rows` and `mover`
are what happens to the data when transactions and a mover meet on it, `fences` how a transaction comes to its state,
`cases` what must hold and what must not. `flags.pml` says the core once more, for Spin.
"""
