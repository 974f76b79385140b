"""Finds the known name that an unknown one was meant to be, for error messages: the same word
spelled otherwise, another word for the same thing, or a word that looks alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

if __name__ == "envs.names":
    raise ImportError("import tutelage.envs, not envs: install the project first")

SYNONYMS: tuple[str, ...] = (
    # keys of a configuration
    "lr learning_rate learningrate step_size eta base_lr peak_lr",
    "betas adam_betas adam_beta1 adam_beta2 beta1 beta2",
    "weight_decay wd l2 decay_rate",
    "clip max_grad_norm grad_clip grad_norm gradient_clip gradient_clipping clip_grad_norm",
    "warmup warmup_steps num_warmup_steps lr_warmup_steps warmup_ratio",
    "decay scheduler lr_scheduler lr_scheduler_type lr_schedule lr_decay",
    "micro_tokens gradient_accumulation gradient_accumulation_steps accumulation_steps grad_accum"
    " micro_batch_size micro_batch max_tokens_per_batch",
    "minibatch mini_batch mini_batch_size minibatch_size ppo_mini_batch_size",
    "recompute gradient_checkpointing activation_checkpointing enable_gradient_checkpointing",
    "temperature temp sampling_temperature",
    "top_p nucleus nucleus_p",
    "max_new_tokens max_length max_tokens max_completion_length max_completion_tokens max_gen_len"
    " max_response_length response_length max_output_tokens new_tokens",
    "max_turns num_turns horizon max_episode_steps",
    "max_live max_num_seqs batch_size_rollout",
    "episodes batch_size train_batch_size per_device_train_batch_size rollout_batch_size"
    " num_episodes batch",
    "group group_size num_generations num_samples samples_per_prompt rollouts_per_prompt n",
    "steps epochs num_epochs num_train_epochs num_steps max_steps total_steps train_steps"
    " iterations num_iterations max_iters total_epochs",
    "every save_steps save_every eval_steps eval_every eval_interval interval frequency",
    "keep save_total_limit max_checkpoints",
    "run output_dir output run_dir save_dir log_dir logdir workdir folder",
    "seed random_seed rng_seed",
    "model model_name model_name_or_path model_path name_or_path path pretrained hub_id",
    "teacher teachers teacher_model teacher_name teacher_name_or_path",
    "student student_model policy_model actor",
    "dtype precision torch_dtype model_dtype",
    "device devices gpu",
    "objective loss loss_type loss_fn algorithm",
    "weight loss_weight coef coefficient kl_coef kl_weight",
    "env environment env_id env_name",
    "env_args env_kwargs env_config environment_args kwargs",
    "eval_args eval_kwargs evaluation_args",
    "evaluation eval evaluate validation",
    "checkpoint checkpoints checkpointing save",
    "rollout rollouts generation sampling generate",
    "optimizer optim optimiser",
    "cluster ray",
    "processes num_workers num_processes num_proc n_procs",
    "system system_prompt system_message",
    "address ray_address host",
    "url base_url api_base endpoint server_url",
    "api_key_env api_key key",
    "timeout time_limit max_time",
    # columns of a file of problems
    "problem question prompt query instruction input problem_text",
    "answer gold target label final_answer ground_truth expected_answer reference_answer",
    "solution rationale explanation worked_solution reasoning cot",
    # values
    "bfloat16 bf16 half fp16 float16 bf16-mixed",
    "float32 fp32 f32 float single tf32",
    "adamw adam adam_w",
    "transformers hf huggingface native torch",
    "server openai http api remote sglang tgi",
    "alternate round_robin roundrobin cyclic in_turn",
    "weighted random proportional",
    "mixed mix joint all",
    "local_support opd reverse_kl topk topk_kl top_k kl",
    "full_vocabulary gkd jsd full_kl",
    "sampled_token policy_gradient ppo grpo reinforce k1",
    "imitation sft cross_entropy supervised bc behavior_cloning",
    "trust_region tropd",
    "entropy_aware eopd",
    "reward_clipped reopold",
    "advantage_gated aopd",
    "greedy argmax deterministic",
    "sampled sampling sample stochastic",
    "cosine cos cosine_with_warmup",
    "constant none constant_with_warmup flat",
    "cuda gpu nvidia",
    "full all history",
    "window sliding recent",
    "num_hidden_layers layers num_layers n_layers depth",
    "hidden_size hidden d_model dim width hidden_dim n_embd",
    "intermediate_size ffn_dim mlp_dim inner ffn_hidden_size",
    "num_attention_heads heads num_heads n_heads n_head",
    "num_key_value_heads kv_heads num_kv_heads n_kv_heads",
    "max_position_embeddings context context_length max_seq_len n_positions block_size",
)
"""Each line has words for one thing, ours and other libraries'. A message suggests the one that is
a known name where the unknown one stood.
"""


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that was most likely meant, or None if none is near."""
    names = sorted(known)
    if same := synonym(name, names):
        return same
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return near[0] if near else None


def synonym(name: object, known: Iterable[str]) -> str | None:
    """The known name that is the same but for its spelling, or another word for it; or None."""
    # Reversed, because the last of equal keys wins: of names spelled alike the first by alphabet.
    spelled = {_plain(one): one for one in sorted(known, reverse=True)}
    word = _plain(name)
    groups = [group for group in _GROUPS if word in group]
    return next(
        (spelled[one] for group in [(word,), *groups] for one in group if one in spelled), None
    )


def _plain(name: object) -> str:
    """Without the case and the marks that people write differently."""
    return str(name).lower().replace("-", "").replace("_", "").replace(" ", "")


_GROUPS = tuple(tuple(map(_plain, line.split())) for line in SYNONYMS)


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """One line: `unknown split 'tset': did you mean 'test'? known: test, train, valid`."""
    names = sorted(known)
    near = nearest(name, names)
    hint = f"did you mean {near!r}? " if near else ""
    return f"unknown {what} {name!r}: {hint}known: {', '.join(names)}"
