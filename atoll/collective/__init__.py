"""Many owners of one model, through any object store: `atoll collective`. docs/collective.md describes it.

store.py bucket.py hub.py connect.py    one interface to directories, buckets and Hugging Face repositories
keys.py statements.py signed.py    ed25519 keys; what members sign, and how
charter.py index.py      who may do what; which experts are in: both are chains of objects that are only ever created
leases.py heartbeat.py checkpoints.py    who trains what, how training keeps its lease, and what a successor gets
files.py member.py       files with hashes; a member's own directory
open.py join.py members.py work.py publish.py status.py page.py    what the commands do
gate/ admit.py retire.py entry.py    the checks of an expert; who enters the index and who leaves it

Every object is created once and never overwritten, because creation is the one operation that all stores do atomically.
Whatever is read from a store is a stranger's: its size is bounded before it is read, its signature checked before use.
"""
