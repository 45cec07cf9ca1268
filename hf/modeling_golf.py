"""The model of this folder for transformers: a frame around the forward of golf_trainer.py."""

import dataclasses

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from .golf_trainer import GPT, Batch, Config, Hooks


class GolfConfig(PretrainedConfig):
    """`settings` are those of the trainer that differ from its defaults, `looped` the route to take."""

    model_type = "golf"

    def __init__(self, settings=None, looped=False, **others):
        self.settings = settings or {}
        self.looped = looped
        others.setdefault("use_cache", False)
        super().__init__(**others)


class GolfForCausalLM(PreTrainedModel, GenerationMixin):
    """Scores the next token; a document begins with the token 1."""

    config_class = GolfConfig

    def __init__(self, config):
        super().__init__(config)
        given = Config.from_env({name: str(value) for name, value in config.settings.items()})
        self.golf = GPT(dataclasses.replace(given, embed_master_fp32=True), dtype=torch.float32)
        self.golf.looped = config.looped
        self.post_init()

    def _init_weights(self, module):
        """They come from the file."""

    def prepare_inputs_for_generation(self, input_ids, **others):
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, labels=None, **others):
        """Logits (B, T, V) of the tokens after `input_ids` (B, T); padding has to be on the right."""
        model = self.golf
        x = model.trunk(Batch(input_ids, input_ids), Hooks())
        cap = model.config.logit_softcap
        logits = cap * torch.tanh(F.linear(x, model.embed) / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
