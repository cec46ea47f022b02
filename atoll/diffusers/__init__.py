"""Atoll as a diffusers pipeline, and diffusers' flow-matching schedulers as drivers of an ensemble.

pipe = atoll.AtollPipeline.from_pretrained("runs/demo/ensemble")
pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
pipe("latin capital letter a, serif bold", num_inference_steps=20).images[0].save("a.png")
pipe.save_pretrained("a-pipeline")
"""

from atoll.diffusers.component import AtollEnsemble, ModelMixin
from atoll.diffusers.pipeline import AtollPipeline
from atoll.diffusers.sigmas import flow_sigmas

__all__ = ["AtollEnsemble", "AtollPipeline", "ModelMixin", "flow_sigmas"]

# The names in model_index.json must not depend on the file that defines a class. ModelMixin is here because diffusers
# looks in the module of a component's class for the base class that says how the component is loaded.
AtollEnsemble.__module__ = AtollPipeline.__module__ = __name__
