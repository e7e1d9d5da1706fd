"""
An operator who does anything at any moment to shards that serve, and what must be true whenever he rests.

Two shards of one server: a canary and one behind it, with a standby that can take over. Runs of the command line are
processes of their own and may be interrupted, killed or stopped; the server may crash, or be replaced by a copy that
lacks the last commits. Applications go on all the while (`torture`), and their oracle tells what each row must be.
All dice are thrown from one seed; what was done is kept as a timeline.

`story` plays it on a `stage`; `history` is what is migrated, `looks` what must be true, `forking` the command line.
"""
