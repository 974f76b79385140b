"""vLLM as the student's rollout engine: `start` starts one in this process, `sync` brings the
learner's weights into it, `engine` is what rollouts use. Only these modules import vLLM."""
