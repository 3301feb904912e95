"""The methods under test, each with options that show every term of its equation."""

from subgraph_peft.passes import IA3, SSB, SSL, BitFit, DoRA, LoRA, MiLoRA, ParallelAdapter, PiSSA, RsLoRA

from subgraph_peft.method import Method

WEIGHT_METHODS: dict[str, Method] = {
    "lora": LoRA(r=2, alpha=5.0),
    "rslora": RsLoRA(r=3, alpha=2.0),
    "ssl": SSL(),
    "ssb": SSB(),
    "ia3_output": IA3(scale="output"),
    "ia3_input": IA3(scale="input"),
    "ia3_weight": IA3(scale="weight"),
    "pissa": PiSSA(r=2),
    "pissa_scaled": PiSSA(r=2, alpha=6.0),
    "pissa_fast": PiSSA(r=2, niter=1),
    "milora": MiLoRA(r=2),
    "dora": DoRA(of=LoRA(r=2, alpha=5.0)),
    "dora_full_gradient": DoRA(of=LoRA(r=2, alpha=5.0), norm_gradient=True),
    "dora_pissa": DoRA(of=PiSSA(r=2)),
    "dora_ssb": DoRA(of=SSB()),
}
OTHER_METHODS: dict[str, Method] = {"bitfit": BitFit(), "parallel_adapter": ParallelAdapter(r=4, scale=0.5)}
METHODS: dict[str, Method] = {**WEIGHT_METHODS, **OTHER_METHODS}
