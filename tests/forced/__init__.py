"""
The model's counterexamples on a real server: two or three transactions, statement by statement, in a fixed order.

`tables` is the data and how a writer in each state treats it, `doors` how a transaction comes to its state, `mutations`
what the protocol is with one thing taken away, `stage` who takes part, `schedules` the table: for each mutation of the
model the schedule that does its harm.
"""
