"""Every form by its `peft_type`."""

from .adalora import AdaLoRAForm
from .form import PeftForm
from .ia3 import IA3Form
from .lora import LoRAForm
from .own import OwnForm
from .prompts import PrefixForm, PromptForm, PTuningForm
from .vera import VeRAForm

FORMS: dict[str, PeftForm] = {
    form.peft_type: form
    for form in (LoRAForm(), AdaLoRAForm(), IA3Form(), VeRAForm(), PromptForm(), PTuningForm(), PrefixForm())
}
OWN = OwnForm()
