"""What a model is trained for: one record for everything that differs between tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Task:
    """head:    the class of transformers that loads such a model
    endings: of the names of such classes
    classes: whether the head has one output a class, so that the labels of the data size and name it
    text:    how rows of text become examples, see `data.ENCODERS`; None where examples come finished
    metrics: what an evaluation reports; None leaves it to the form of the labels
    peft:    the task type of huggingface/peft, if it has one        saved: modules that peft then saves as a whole
    """

    head: str
    endings: tuple[str, ...]
    classes: bool = False
    text: Literal["class", "completion"] | None = None
    metrics: tuple[str, ...] | None = None
    peft: str | None = None
    saved: tuple[str, ...] = ()


TASKS: Mapping[str, Task] = {
    "sequence-classification": Task(
        "AutoModelForSequenceClassification", ("ForSequenceClassification",), classes=True, text="class",
        peft="SEQ_CLS", saved=("classifier", "score"),
    ),
    "token-classification": Task(
        "AutoModelForTokenClassification", ("ForTokenClassification",), classes=True, metrics=("accuracy",),
        peft="TOKEN_CLS", saved=("classifier", "score"),
    ),
    "question-answering": Task(
        "AutoModelForQuestionAnswering", ("ForQuestionAnswering",), peft="QUESTION_ANS", saved=("qa_outputs",)
    ),
    "multiple-choice": Task("AutoModelForMultipleChoice", ("ForMultipleChoice",)),
    "image-classification": Task("AutoModelForImageClassification", ("ForImageClassification",), classes=True),
    "causal-lm": Task(
        "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), text="completion", metrics=("perplexity",),
        peft="CAUSAL_LM",
    ),
    "masked-lm": Task("AutoModelForMaskedLM", ("ForMaskedLM",), metrics=("perplexity",)),
    "seq2seq-lm": Task(
        "AutoModelForSeq2SeqLM", ("ForConditionalGeneration",), metrics=("perplexity",), peft="SEQ_2_SEQ_LM"
    ),
    "feature-extraction": Task("AutoModel", ("Model",), peft="FEATURE_EXTRACTION"),
}  # fmt: skip
CLASSIFYING = tuple(name for name, task in TASKS.items() if task.classes)


def task_of(model: str, encoder_decoder: bool) -> str | None:
    """The task of a model's class by its name, as transformers names them; None for one of no task here.

    Of classes for conditional generation, those that are no encoder-decoders are causal language models.
    """
    found = next((name for name, task in TASKS.items() if model.endswith(task.endings)), None)
    return "causal-lm" if found == "seq2seq-lm" and not encoder_decoder else found
