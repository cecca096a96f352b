"""The peer of bench/serve.py, torch behind FastAPI; and an export in a process with what an agent holds."""

import json
import re
import sys
from pathlib import Path


def serve(folder: Path) -> None:
    """Serve the pruned model with torch eager: raw float32 in, logits in raw float32 out."""
    import socket

    import numpy as np
    import torch
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from safetensors.numpy import load_file

    from export.cut import cut
    from foundation.nn.bridge import to_module
    from foundation.parameters import Parameters
    from foundation.spec import ModelSpec

    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(True)  # torch as it comes
    spec = ModelSpec.model_validate_json((folder / "spec.json").read_text())
    with np.load(folder / "masks.npz") as masks:
        small = cut(Parameters(load_file(folder / "dense.safetensors")), dict(masks))
    model = to_module(spec, small).eval()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/infer")
    async def infer(asked: Request) -> Response:
        x = np.frombuffer(await asked.body(), "<f4").reshape(-1, *spec.shape)
        with torch.inference_mode():
            return Response(model(torch.from_numpy(x.copy())).numpy().tobytes())

    listening = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write("serving http://{}:{}\n".format(*listening.getsockname()))
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning")).run(sockets=[listening])


def export(folder: Path) -> None:
    """Export and prove the model of a folder, with an agent's modules loaded before."""
    import numpy as np
    from safetensors.numpy import load_file

    import edge_agent.__main__
    from export.folder import load_artifact, resolve
    from foundation.normalisation import Normalisation
    from foundation.parameters import Parameters
    from foundation.spec import ModelSpec

    assert edge_agent.__main__.main
    spec = ModelSpec.model_validate_json((folder / "spec.json").read_text())
    parameters = Parameters(load_file(folder / "dense.safetensors"))
    with np.load(folder / "masks.npz") as found:
        masks = dict(found)
    manifest, _, probe = load_artifact(resolve(folder))
    before = memory("VmRSS")
    from export.package import export_artifact

    export_artifact(
        spec, parameters, masks, Normalisation(), manifest.labels, probe, folder / "again",
        agent="bench", run="bench", round=1, strategy="local",
    )  # fmt: skip
    told = {"before_bytes": before, "peak_bytes": memory("VmHWM"), "torch": "torch" in sys.modules}
    sys.stdout.write(json.dumps(told) + "\n")


def memory(what: str) -> int:
    """Bytes of this process, resident now (VmRSS) or at most so far (VmHWM)."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    {"serve": serve, "export": export}[sys.argv[1]](Path(sys.argv[2]))
