"""Many owners of one model, through any object store: `atoll collective`. docs/collective.md describes it.

store.py bucket.py hub.py connect.py    one interface to directories, buckets and Hugging Face repositories
keys.py statements.py    ed25519 keys; the statements that members sign
charter.py index.py      who may do what; which experts are in: both are chains of objects that are only ever created
leases.py heartbeat.py   who trains what, and how training keeps its lease
files.py member.py       files with hashes; a member's own directory
open.py join.py members.py work.py publish.py status.py    what the commands do

Every object is created once and never overwritten, because creation is the one operation that all stores do atomically.
Whatever is read from a store is a stranger's: its size is bounded before it is read, its signature checked before use.
"""
