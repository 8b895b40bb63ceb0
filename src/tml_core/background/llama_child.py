"""The process behind `LlamaServer`: serves one GGUF file until its stdin ends or its parent does.

Run by path, not as a module: it must start fast and needs nothing of this package.
"""

import json
import os
import select
import sys


def main() -> None:
    options = json.loads(sys.argv[1])
    os.nice(options["niceness"])
    # What the library prints on stdout must not get between us and the parent.
    answer = os.dup(1)
    os.dup2(2, 1)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.use_jinja = True
    params.n_ctx = options["context_len"]
    params.n_parallel = options["num_slots"]
    params.cpuparams.n_threads = options["num_threads"]
    params.cpuparams_batch.n_threads = options["num_threads"]
    params.verbosity = -1
    server = xllamacpp.Server(params)
    os.write(answer, json.dumps({"url": server.listening_address}).encode() + b"\n")
    os.close(answer)
    while os.getppid() == options["parent"]:
        ready, _, _ = select.select([0], [], [], 1.0)
        if ready and not os.read(0, 1):
            break
    # Its threads have nothing to save; an orderly end would wait for requests.
    os._exit(0)


main()
