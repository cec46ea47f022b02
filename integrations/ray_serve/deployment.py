"""Replicas of an ensemble behind one address, by Ray Serve.

    pip install 'atoll[serve]' 'ray[serve]'
    serve run deployment:build ensemble=/shared/runs/demo/ensemble replicas=4

Each replica is a process with an engine of its own, on any machine of the Ray cluster; the ensemble's directory must be
readable on all of them. A request goes to any replica, so there are images in base64, but neither files nor jobs with
events. Ray Serve does not repeat a request whose replica died: the client sees an error.
"""

from ray import serve
from ray.serve import Application


def build(arguments: dict[str, str]) -> Application:
    """Return the application.

    Args:
        arguments: ensemble: the directory; replicas: their number, default 1; gpus and cpus: per replica, default 0 and
            1; token: what requests must have, default: none.
    """

    def app():
        # Imported in the replica only: Ray's controller needs no torch.
        from atoll.pipeline import Pipeline
        from atoll.serve.app import create_app
        from atoll.serve.engine import Engine
        from atoll.serve.settings import ServerSettings

        tokens = tuple(filter(None, [arguments.get("token")]))
        engine = Engine(Pipeline.from_pretrained(arguments["ensemble"]))
        return create_app({"ensemble": engine}, ServerSettings(tokens=tokens, replicated=True))

    options = {"num_gpus": float(arguments.get("gpus", 0)), "num_cpus": float(arguments.get("cpus", 1))}
    replicas = int(arguments.get("replicas", 1))
    return serve.deployment(num_replicas=replicas, ray_actor_options=options)(serve.ingress(app)()).bind()
