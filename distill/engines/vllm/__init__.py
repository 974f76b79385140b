"""vLLM as the student's rollout engine: `start` an engine in this process, `sync` the learner's
weights into it, and the `engine` that rollouts speak to. Only these modules import vLLM."""
