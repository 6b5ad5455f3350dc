"""NOT llama-server: a stand-in for tests without a binary. It answers as the real one (0c1e57098) did, or misbehaves.

``STAND_IN`` chooses: ``good``, ``slow`` (30 ms per token), ``silent`` (loads the drafter, drafts nothing),
``old`` (flags of 2025), ``crash`` (ends while it loads), ``other`` (another program), ``gpu`` (lists two), ``nan``
(logits are NaN), ``late`` (likewise from the fourth token of an answer on: all are 0). Its answers are tokens 300, 301,
...: rounds of 1, then of 3 (2 of 4 drafts accepted), with the timings' fields as recorded.
"""

import json
import os
import sys
import time
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

    def authorized(self):
        if self.headers.get("Authorization") == f"Bearer {os.environ['LLAMA_API_KEY']}":
            return True
        self.answer(401, {"error": {"code": 401, "message": "Invalid API Key", "type": "authentication_error"}})
        return False

    def do_GET(self):
        if self.path == "/health":
            self.answer(200, {"status": "ok"})
        elif self.authorized():
            self.answer(200, {"build_info": "b0-stand-in", "default_generation_settings": {"n_ctx": 512}})

    def do_POST(self):
        if not self.authorized():
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.answer(200, {"tokens": json.loads(os.environ["STAND_IN_TOKENS"])})
            return
        drafts = MODE != "silent" and "--spec-type" in sys.argv
        if not body.get("stream"):
            answer = {"timings": {"draft_n": 12, "draft_n_accepted": 4} if drafts else {}}
            if body.get("n_probs"):
                # As nlohmann::json writes NaN. A prompt that ends with 0 is the output of logits that are NaN.
                bad = MODE == "nan" or (MODE == "late" and body["prompt"][-1] == 0)
                answer["completion_probabilities"] = [{"id": 0, "logprob": None if bad else -0.5}]
            self.answer(200, answer)
            return
        self.send_response(200)
        self.end_headers()
        first = max(0, len(body["prompt"]) - 3)
        for index in range(first, first + body["n_predict"]):
            rounds = (index - first + 2) // 3
            if MODE == "slow":
                time.sleep(0.03)
            timings = {"predicted_ms": 0.001 + 2.5 * rounds if drafts else 0.001 + index}
            if drafts and rounds:
                timings |= {"draft_n": 4 * rounds, "draft_n_accepted": 2 * rounds}
            token = 1 if index == EOS_AT else 300 + index
            if MODE == "late" and index > first + 2:
                token = 0
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
        assert os.environ["GGML_CUDA_PDL"] == "0"  # see polydraft_gguf.environment
        address = ("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))
        ThreadingHTTPServer(address, Handler).serve_forever()
