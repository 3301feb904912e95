"""The next token of every row: the likeliest one, or drawn after transformers' own filters."""

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from subgraph_peft.base.errors import ExportError


class Sampler:
    """Logits [batch, vocabulary] to token ids [batch].

    Raises ExportError for filters without `do_sample`, a temperature that is not positive, a negative top_k and a top_p
    outside (0, 1].
    """

    def __init__(
        self, do_sample: bool, temperature: float, top_k: int | None, top_p: float | None, seed: int | None,
        device: torch.device,
    ):  # fmt: skip
        self.do_sample, self.random = do_sample, None
        self.filters = LogitsProcessorList()
        if not do_sample and (temperature != 1.0 or top_k or top_p is not None):
            raise ExportError("temperature, top_k and top_p shape what is drawn: they need do_sample=True.")
        if not temperature > 0:
            raise ExportError(f"temperature is {temperature}, not above 0. For the likeliest token, do not sample.")
        if temperature != 1.0:
            self.filters.append(TemperatureLogitsWarper(float(temperature)))
        try:
            if top_k:
                self.filters.append(TopKLogitsWarper(top_k))
            if top_p is not None and top_p != 1.0:
                self.filters.append(TopPLogitsWarper(top_p))
        except ValueError as error:
            raise ExportError(f"{error}.") from error
        if seed is not None:
            self.random = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.do_sample:
            return logits.argmax(-1)
        probabilities = self.filters(None, logits.float()).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.random).squeeze(1)
