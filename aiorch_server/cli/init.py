"""``aiorch init``: a folder to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aiorch_server.cli.output import CommandError, ExitCode, Json, Output

_PLAIN = """\
# Settings of this server; docs/settings.md has all of them. Start it here with
#   aiorch serve --config aiorch.yaml
# What stands here gives way to AIORCH_... in the environment, and that to options on the command line.

grpc:
  host: 127.0.0.1   # this machine alone; for others see: aiorch init --secure
  port: 8001
http:
  port: 8000
metrics:
  port: 8002        # GET /metrics, for Prometheus

repository:
  paths: [models]   # a folder per model: models/hello
lifecycle:
  control_mode: poll  # a changed folder is loaded by itself; none: only at start; explicit: on request
  poll_secs: 5

# A registry: versions, aliases, rollouts (aiorch model push, aiorch deploy). Needs: pip install 'aiorchestrator[admin]'
# registry:
#   url: sqlite:///aiorch.db      # or postgresql://USER:PASSWORD@HOST/NAME, best as AIORCH_REGISTRY_URL
#   artefacts: artefacts          # a folder, or s3://BUCKET/PREFIX

log:
  level: info
"""

_SECURE = """\
# Settings of a server that other machines reach; docs/settings.md has all of them. Start it here with
#   aiorch serve --config aiorch.yaml
# What stands here gives way to AIORCH_... in the environment, and that to options on the command line.
#
# Before the first start: put the certificate and key below in place, and make an API key for yourself:
#   python -c "from aiorch_server.security.api_keys import make_key as m; k = m(); print(k.text, k.id, k.sha256.hex())"
# The first word is the key, to be kept and sent (AIORCH_TOKEN); the others belong below as id and sha256.

grpc:
  host: 0.0.0.0
  port: 8001
  tls:
    certificate: tls/server.pem
    key: tls/server.key
    # root: tls/clients.pem       # authorities of clients' certificates, and
    # require_client_auth: true   # nobody without one
http:
  enabled: false                  # or host: 0.0.0.0 with a tls section as above
metrics:
  host: 127.0.0.1                 # counts tell something too: for this machine alone
  port: 8002

repository:
  paths: [models]
registry:
  url: sqlite:///aiorch.db        # or postgresql://USER:PASSWORD@HOST/NAME, best as AIORCH_REGISTRY_URL
  artefacts: artefacts            # a folder, or s3://BUCKET/PREFIX

security:
  enabled: true
  api_keys:
    - id: replace                 # this one is known to nobody
      sha256: "{placeholder}"
      principal: operator
  bindings:
    - {{principal: operator, role: admin, models: "*"}}
  # tokens:                       # of an identity provider (JWT)
  #   - issuer: https://id.example.org
  #     audience: [aiorch]

log:
  level: info
"""

_MODEL_CONFIG = """\
# The configuration of the model hello: Triton's fields, as config.yaml or config.pbtxt (docs/model-configuration.md).
backend: python
max_batch_size: 8
dynamic_batching:
  max_queue_delay_microseconds: 500   # requests that come within it run as one batch
instance_group:
  - count: 1                          # copies that run at the same time
    kind: KIND_CPU
"""

_MODEL = '''\
"""An example: doubles what it gets. docs/python-models.md tells what a model may have."""


class Model:
    inputs = [("x", "FP32", [4])]
    outputs = [("y", "FP32", [4])]

    def execute(self, inputs):
        return {"y": inputs["x"] * 2}
'''

_IGNORED = """\
artefacts/
artefacts-cache/
*.db*
tls/
"""


def init(
    folder: Annotated[Path, typer.Argument(help="Where to; made if it is not there.")] = Path(),
    secure: Annotated[
        bool, typer.Option("--secure", help="For a server that other machines reach: TLS, API keys, a registry.")
    ] = False,
    json: Json = False,
) -> None:
    """Writes a starting configuration, aiorch.yaml, with an example model; never over what is there."""
    output = Output(json)
    with output.guard():
        files = {
            "aiorch.yaml": write_secure() if secure else _PLAIN,
            "models/hello/config.yaml": _MODEL_CONFIG,
            "models/hello/1/model.py": _MODEL,
            ".gitignore": _IGNORED,
        }
        written, kept = _write(folder, files)
        lines = [f"wrote {folder / name}" for name in written] + [f"kept {folder / name}" for name in kept]
        where = "" if folder == Path() else f"cd {folder} && "
        nexts = f"next: edit {folder / 'aiorch.yaml'}, then" if secure else "next:"
        output.show({"written": written, "kept": kept}, *lines, f"{nexts} {where}aiorch serve --config aiorch.yaml")


def write_secure() -> str:
    """The configuration of a server that other machines reach; with a key that nobody has."""
    import secrets

    return _SECURE.format(placeholder=secrets.token_hex(32))


def _write(folder: Path, files: dict[str, str]) -> tuple[list[str], list[str]]:
    written, kept = [], []
    for name, text in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            written.append(name)
        except FileExistsError:
            kept.append(name)
        except OSError as error:
            raise CommandError(f"{path} cannot be written: {error.strerror}", ExitCode.REFUSED) from error
    return written, kept
