"""Stands for the program `llama-server`: llama.cpp's own server, from the wheel xllamacpp.

The wheel has the server and not the program's reading of options; here are those that flagscale-serve gives.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

import xllamacpp


def main():
    if "--version" in sys.argv:
        print("version: 11549 (xllamacpp)")
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--model", "--alias", "--host"):
        parser.add_argument(name, required=True)
    for name in ("--port", "--threads", "--threads-http", "--timeout", "--ctx-size", "--parallel"):
        parser.add_argument(name, type=int)
    parser.add_argument("--metrics", action="store_true")
    given = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.model_alias = set(given.alias.split(","))
    params.hostnames = [given.host]
    params.port = given.port
    params.endpoint_metrics = given.metrics
    params.use_jinja = True
    params.cpuparams.n_threads = given.threads
    params.n_threads_http = given.threads_http
    params.timeout_read = params.timeout_write = given.timeout
    if given.ctx_size is not None:
        params.n_ctx = given.ctx_size
    if given.parallel is not None:
        params.n_parallel = given.parallel
    if "LLAMA_API_KEY" in os.environ:
        params.api_keys = [os.environ["LLAMA_API_KEY"]]
    server = xllamacpp.Server(params)
    print("server is listening on", server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
