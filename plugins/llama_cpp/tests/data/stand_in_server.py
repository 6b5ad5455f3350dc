"""NOT llama-server: a stand-in for tests where no binary is. It says what the real one (0c1e57098) said, or misbehaves.

``STAND_IN`` chooses: ``good``, ``silent`` (loads the drafter, drafts nothing), ``old`` (flags of 2025), ``crash`` (ends
while it loads), ``other`` (another program), ``gpu`` (lists two). Its answers are tokens 300, 301, ...: rounds of 1,
then of 3 (2 of 4 drafts accepted), with the timings' fields as recorded.
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODE = os.environ.get("STAND_IN", "good")
EOS_AT = 10
HELP = """--ctx-size N
--no-ui
--spec-draft-model, -md, --model-draft FNAME
--spec-draft-n-max N
--spec-type none,draft-simple,draft-eagle3,draft-mtp
"""
GPUS = """  BLAS: OpenBLAS (0 MiB, 0 MiB free)
  CUDA0: NVIDIA H100 80GB HBM3 (81079 MiB, 80550 MiB free)
  CUDA1: NVIDIA H100 80GB HBM3 (81079 MiB, 80550 MiB free)
"""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer(200, {"status": "ok"})

    def do_POST(self):
        if self.headers.get("Authorization") != f"Bearer {os.environ['LLAMA_API_KEY']}":
            self.answer(401, {"error": {"code": 401, "message": "Invalid API Key", "type": "authentication_error"}})
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        drafts = MODE != "silent" and "--spec-type" in sys.argv
        if not body.get("stream"):
            self.answer(200, {"timings": {"draft_n": 12, "draft_n_accepted": 4} if drafts else {}})
            return
        self.send_response(200)
        self.end_headers()
        first = max(0, len(body["prompt"]) - 3)
        for index in range(first, first + body["n_predict"]):
            rounds = (index - first + 2) // 3
            timings = {"predicted_ms": 0.001 + 2.5 * rounds if drafts else 0.001 + index}
            if drafts and rounds:
                timings |= {"draft_n": 4 * rounds, "draft_n_accepted": 2 * rounds}
            token = 1 if index == EOS_AT else 300 + index
            event = {"index": 0, "content": "x", "tokens": [token], "stop": False, "timings": timings}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if token == 1:
                break
        self.wfile.write(b'data: {"index": 0, "content": "", "tokens": [], "stop": true}\n\n')


if __name__ == "__main__":
    if "--version" in sys.argv:
        print("something else 1.0" if MODE == "other" else "version: 0.0.0 (stand-in, not llama-server)")
    elif "--help" in sys.argv:
        print(HELP.replace("--spec-draft-n-max", "--draft-max") if MODE == "old" else HELP)
    elif "--list-devices" in sys.argv:
        print("Available devices:\n" + (GPUS if MODE == "gpu" else "  (none)"))
    elif MODE == "crash":
        sys.exit("error loading model: unknown model architecture")
    else:
        address = ("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))
        ThreadingHTTPServer(address, Handler).serve_forever()
