"""Worker processes: a session's engine in a process of its own, behind the same ``Session``.

The app's side is ``WorkerBackend`` (``backend.py``); the worker runs ``python -m polydraft._workers.child``. Between
them goes the protocol of ``docs/worker-protocol.md``.
"""
