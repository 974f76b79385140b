"""TRL's side of peers.py: its GKD trainer, on-policy, in the settings that are fastest here.

It logs and saves nothing and recomputes nothing; AdamW is the fused one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer
from turns import JOB, Turns


class Watch(TrainerCallback):
    """Takes turns, and times the parts of a step."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._parts = turns, defaultdict[str, float](float)
        self._reply = self._prompt = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._turns.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        episodes = JOB["episodes"]
        parts = dict(self._parts)
        parts["student"] -= parts["teacher"]  # the loss calls the teacher
        self._turns.done(reply=self._reply / episodes, prompt=self._prompt / episodes, parts=parts)
        self._parts.clear()
        self._reply = self._prompt = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            found = function(*given, **named)
            self._parts[part] += time.perf_counter() - begun
            return found

        return call

    def generated(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Also counts tokens."""
        timed = self.timed("generate", function)

        def call(model: Any, inputs: Any, generation: Any) -> Any:
            ids_BT, mask_BT, labels_BT = timed(model, inputs, generation)
            replies = int((labels_BT != -100).sum())
            self._reply += replies
            self._prompt += int(mask_BT.sum()) - replies
            return ids_BT, mask_BT, labels_BT

        return call


def main() -> None:
    torch.set_num_threads(JOB["threads"])
    turns = Turns()
    watch = Watch(turns)
    model, teacher = (
        AutoModelForCausalLM.from_pretrained(JOB["model"], dtype=torch.float32) for _ in range(2)
    )
    # not AutoTokenizer, which takes the tokenizer of the model's type for these
    tokenizer = PreTrainedTokenizerFast.from_pretrained(JOB["model"])
    micro = JOB["micro"]
    trainer = GKDTrainer(
        model=model,
        teacher_model=teacher,
        args=GKDConfig(
            output_dir=JOB["folder"],
            lmbda=1.0,
            beta=JOB["beta"],
            temperature=1.0,
            max_new_tokens=JOB["max_new_tokens"],
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=JOB["episodes"] // micro,
            max_steps=JOB["most"],
            learning_rate=JOB["lr"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta2=0.95,
            weight_decay=0.01,
            max_grad_norm=1.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [{"messages": messages} for messages in JOB["conversations"]]
        ),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.generation_config.top_p = JOB["top_p"]
    trainer.generation_kwargs["top_p"] = JOB["top_p"]
    trainer.generate_on_policy_outputs = watch.generated(trainer.generate_on_policy_outputs)
    trainer.compute_loss = watch.timed("student", trainer.compute_loss)
    trainer.teacher_model.forward = watch.timed("teacher", trainer.teacher_model.forward)
    trainer.accelerator.backward = watch.timed("backward", trainer.accelerator.backward)
    trainer.create_optimizer()
    trainer.optimizer.step = watch.timed("optimizer", trainer.optimizer.step)
    trainer.train()


if __name__ == "__main__":
    main()
