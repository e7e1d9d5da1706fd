"""
A model of the flag protocol, small enough to look at every state it can reach.

`search` is the engine, `flagrow` the ledger's row (its edges are `shardmig.states.EDGES`); `world`, `rows` and `mover`
are what happens to the data when transactions and a mover meet on it, `handful` the mover's short way, `several` moves
and failovers, `fences` how a transaction comes to its state; `cases` says what must hold of the protocol and what must
not, `runner_cases` of what a runner does with it. `flags.pml` says the core once more, for Spin.
"""
