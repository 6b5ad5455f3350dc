"""Long batches: a file of requests in OpenAI's batch format in, a file of answers out; ``polydraft batch``.

A line is answered by the server's own app, in this process and without a socket: it gets what the server would answer.
"""

from polydraft_server.batch.ray_data import RayWorkers
from polydraft_server.batch.run import BatchSummary, run_batch

__all__ = ["BatchSummary", "RayWorkers", "run_batch"]
