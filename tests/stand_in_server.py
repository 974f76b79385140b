"""An OpenAI-compatible server with vLLM's additions, of a tiny model, in a thread of the test. It
misbehaves on request. What it answers comes from plain forwards, one row at a time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Answer = dict[str, Any]


class StandIn:
    """Serves `model` under `name`.

    faults: what is done to the next completions, one each: see `_Handler`. hangs: lengths of
    prompts that get no answer. max_logprobs, max_model_len, key, detokenize: as a server is started
    with. most: requests at a time, so far.
    """

    def __init__(self, model: Any, *, name: str = "m", port: int = 0, **options: Any) -> None:
        self.model, self.name = model, name
        self.faults: list[str] = []
        self.hangs: set[int] = set()
        self.max_logprobs: int = options.get("max_logprobs", 20)
        self.max_model_len: int = options.get("max_model_len", 512)
        self.key: str | None = options.get("key")
        self.detokenize: Callable[[list[int]], str] | None = options.get("detokenize")
        self.lock, self.released = threading.Lock(), threading.Event()
        self.asked = self.flying = self.most = 0
        handler = type("Handler", (_Handler,), {"serving": self})
        self._server = _Quiet(("127.0.0.1", port), handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """As if killed: the port is free again."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def completion(self, asked: Answer) -> Answer:
        """What `/v1/completions` answers; raises _No for a 4xx."""
        with self.lock:
            self.flying += 1
            self.most = max(self.most, self.flying)
        try:
            time.sleep(0.01)  # so that requests meet
            return self._scored(asked)
        finally:
            with self.lock:
                self.flying -= 1

    @torch.no_grad()
    def _scored(self, asked: Answer) -> Answer:
        ids, k = asked["prompt"], asked["prompt_logprobs"]
        rows = self.model.get_output_embeddings().weight.shape[0]
        if asked["model"] != self.name:
            raise _No(404, f"The model `{asked['model']}` does not exist.")
        if k > self.max_logprobs:
            allowed = self.max_logprobs
            raise _No(
                400,
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {allowed}",
            )
        if len(ids) + asked["max_tokens"] > self.max_model_len:
            raise _No(
                400, f"This model's maximum context length is {self.max_model_len} tokens. However"
            )
        if max(ids) >= rows:
            raise _No(400, f"Token id {max(ids)} is out of vocabulary")
        logprobs_TV = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        parts: list[Answer | None] = [None]
        for token, logprobs_V in zip(ids[1:], logprobs_TV, strict=False):
            top = logprobs_V.topk(k)
            rank = int((logprobs_V > logprobs_V[token]).sum()) + 1
            found = [(token, float(logprobs_V[token]), rank)]
            found += zip(top.indices.tolist(), top.values.tolist(), range(1, k + 1), strict=True)
            parts.append(
                {
                    str(i): {"logprob": max(x, -9999.0), "rank": r, "decoded_token": f"<{i}>"}
                    for i, x, r in found
                }
            )
        return {"object": "text_completion", "choices": [{"text": "x", "prompt_logprobs": parts}]}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is no news."""


class _No(Exception):
    """A 4xx."""


class _Handler(BaseHTTPRequestHandler):
    serving: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._served(lambda _: {"data": [{"id": self.serving.name}]})

    def do_POST(self) -> None:
        if self.path == "/detokenize":
            self._served(self._detokenized)
        else:
            with self.serving.lock:
                self.serving.asked += 1
                fault = self.serving.faults.pop(0) if self.serving.faults else ""
            self._served(self.serving.completion, fault)

    def _detokenized(self, asked: Answer) -> Answer:
        if self.serving.detokenize is None:
            raise _No(404, "Not Found")
        return {"prompt": self.serving.detokenize(asked["tokens"])}

    def _served(self, answer: Callable[[Answer], Answer], fault: str = "") -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.serving.key and self.headers["Authorization"] != f"Bearer {self.serving.key}":
            return self._send(401, {"error": "Unauthorized"})
        if fault == "error":
            return self._send(500, {"error": {"message": "the engine core is dead"}})
        if fault == "hang" or len(asked.get("prompt", "")) in self.serving.hangs:
            self.serving.released.wait(20)
        try:
            found = answer(asked)
        except _No as no:
            status, text = no.args
            return self._send(status, {"error": {"message": text, "code": status}})
        if fault:  # those of the answer's content
            _spoil(found, fault)
        self._send(200, found, fault)

    def _send(self, status: int, answer: Answer, fault: str = "") -> None:
        body = json.dumps(answer).encode()
        if fault == "no json":
            body = b"<html>gateway</html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if fault == "cut":
            body = body[: len(body) // 2]
        if fault == "stuck":
            self.wfile.write(body[:9])
            self.serving.released.wait(20)
        if fault == "slow":  # each byte in time, the whole too late
            for at in range(0, len(body), max(1, len(body) // 40)):
                self.wfile.write(body[at : at + len(body) // 40])
                time.sleep(0.05)
            return
        self.wfile.write(body)
        self.close_connection = True


def _spoil(found: Answer, fault: str) -> None:
    """Change an answer into one that is none. Its fourth token is the one that is wrong."""
    choice = found["choices"][0]
    parts = choice["prompt_logprobs"]
    first = next(iter(parts[3]))
    if fault == "nan":
        parts[3][first]["logprob"] = float("nan")
    elif fault == "null":
        parts[3][first]["logprob"] = None
    elif fault == "logits":
        for one in parts[3].values():
            one["logprob"] += 9.0
    elif fault == "short":
        del parts[-1]
    elif fault == "empty":
        parts[3] = {}
    elif fault == "other token":
        parts[3]["100"] = parts[3].pop(first)
    elif fault == "no logprobs":
        del choice["prompt_logprobs"]
    elif fault == "no choice":
        found["choices"] = []
