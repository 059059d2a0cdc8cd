"""llama.cpp's server over HTTP: one slot a stream, one connection a request, nothing streamed.

Times of first tokens follow from the server's own timings, so no client that parses events takes
cores away. Weights are float32; K and V are float16, the server's default.

Owns: the server's process.  Thread-safety: ``run`` uses a thread for each request.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from make_gguf import convert
from measured import Completion, Job, Request, main

START_LIMIT_S = 120.0
POLL_S = 0.02
PHYSICAL_BATCH = 512


class LlamaServer:
    """Option ``server``: the executable."""

    def load(self) -> None:
        pass

    def construct(self, job: Job) -> None:
        self._job = job
        self._num_slots = min(job.max_num_seqs, sum(request.n for request in job.requests))
        self._port = _free_port()
        batch = max(PHYSICAL_BATCH, job.max_batched_tokens)
        settings = {
            "--model": str(convert(Path(job.model))),
            "--port": self._port,
            "--threads": job.threads,
            "--threads-batch": job.threads,
            "--parallel": self._num_slots,
            "--ctx-size": self._num_slots * job.max_model_len,
            "--batch-size": batch,
            "--ubatch-size": batch,
        }
        command = [job.options["server"], "--no-kv-unified", "--no-ui", "--offline"]
        for name, value in settings.items():
            command += [name, str(value)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._wait_until_ready()

    def run(self, requests: list[Request]) -> list[Completion]:
        with ThreadPoolExecutor(len(requests)) as pool:
            answers = pool.map(self._complete, range(len(requests)), requests)
            return [completion for several in answers for completion in several]

    def _complete(self, idx: int, request: Request) -> list[Completion]:
        body = {
            "prompt": request.prompt,
            "n_predict": request.max_tokens,
            "n_cmpl": request.n,
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": True,
            "samplers": ["temperature"],
            "temperature": 0.0 if self._job.is_greedy else 1.0,
            "seed": request.seed,
        }
        answer = self._ask("POST", "/completion", body)
        last_s = time.monotonic()
        return [
            Completion(idx, one["tokens"], last_s - one["timings"]["predicted_ms"] / 1e3, last_s)
            for one in (answer if isinstance(answer, list) else [answer])
        ]

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{path} answered {response.status}: {answer}")
        return answer

    def _wait_until_ready(self) -> None:
        limit = time.monotonic() + START_LIMIT_S
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}")
            try:
                self._ask("GET", "/health")
                return
            except (OSError, RuntimeError, http.client.HTTPException):
                if time.monotonic() > limit:
                    raise
                time.sleep(POLL_S)

    def kv_bytes(self) -> dict[str, int]:
        config = json.loads((Path(self._job.model) / "config.json").read_text())
        heads, width = config["num_key_value_heads"], config["head_dim"]
        row_bytes = 2 * config["num_hidden_layers"] * heads * width * 2
        size = self._num_slots * self._job.max_model_len * row_bytes
        return {"reserved": size, "committed": size}

    def versions(self) -> dict[str, str]:
        command = [self._job.options["server"], "--version"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        lines = (said.stdout + said.stderr).splitlines()
        return {"llama.cpp": next((line for line in lines if "version" in line), "unknown")}

    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    os.environ.pop("OMP_NUM_THREADS", None)  # the server counts its own threads
    main(LlamaServer())
