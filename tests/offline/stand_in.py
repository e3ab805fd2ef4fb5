"""Stands in for vLLM's command: a server that answers /health, a client whose figures are known, in milliseconds.

A model whose folder is called so makes the server `deaf` (never up), or the client report `unanswered` requests, `fail`
itself, or bring the server down (`fatal`).
"""

import json
import os
import sys
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("(EngineCore pid=1) MemoryError: no room", flush=True)
            os._exit(9)
        self.send_response(200)
        self.end_headers()


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def serve() -> None:
    if sys.argv[2].endswith("deaf"):
        sys.exit("ValueError: this model can not be served")
    HTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()


def bench() -> None:
    prompts, output, model = int(option("--num-prompts")), int(option("--random-output-len")), option("--model")
    if model.endswith("fail"):
        sys.exit("ValueError: no such dataset")
    if model.endswith("fatal"):
        with suppress(OSError):
            urllib.request.urlopen(f"{option('--base-url')}/die")
        time.sleep(60)
    completed = prompts - model.endswith("unanswered")
    result = {"completed": completed, "total_output_tokens": completed * output}
    result |= {"output_throughput": 100.0 + int(option("--seed")), "total_token_throughput": 200.0}
    result |= {"median_ttft_ms": 1.0, "median_itl_ms": 1.0, "p99_itl_ms": 1.0}
    (Path(option("--result-dir")) / option("--result-filename")).write_text(json.dumps(result))


if __name__ == "__main__":
    {"serve": serve, "bench": bench}[sys.argv[1]]()
