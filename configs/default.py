"""Every key, once, with its unit and meaning. The other configs start from here and change what differs.

    python main.py --config=configs/default.py --config.KEY=VALUE

The defaults are the model and training set-up of the PyTorch original on a small scale; `configs/shakespeare.py` is
the recipe to start with.
"""

from ml_collections import ConfigDict, FieldReference

MOST_USED = (  # what `--help` shows
    *("run", "dataset", "tokenizer", "max_steps", "epochs", "batch_size", "context_len", "num_blocks", "num_heads"),
    *("embedding_dim", "mlp_dim", "attention_sink", "lr", "muon_lr", "use_muon", "schedule", "eval_every", "seed"),
)


def get_config() -> ConfigDict:
    config = ConfigDict()

    # --- Model -------------------------------------------------------------------------------------------------
    config.num_blocks = 4  # layers
    config.num_heads = 4  # query heads in each layer
    config.num_kv_heads = 0  # key/value heads; 0: as many as num_heads; fewer: grouped-query attention
    config.embedding_dim = 128  # width of the residual stream
    config.head_dim = 0  # width of a head; 0: embedding_dim / num_heads
    config.mlp_dim = 512  # hidden width of the MLP
    config.context_len = 64  # tokens in a sequence, and how far back attention can look
    config.mlp = "gelu"  # gelu (exact) | gelu_tanh | relu2 | swiglu | swiglu_clamped (gpt-oss)
    config.norm = "layernorm"  # layernorm | rmsnorm
    config.norm_eps = 1e-5  # added to the variance (layernorm) or mean square (rmsnorm)
    config.norm_bias = True  # layernorm has a bias
    config.position = "learned"  # learned | rope | none
    config.rope_theta = 10_000.0  # rotary base
    config.rope_scaling = "none"  # none | yarn | llama3 (YaRN with its ramp over turns, not planes)
    config.yarn_factor = 32.0  # how many times longer than yarn_original_context
    config.yarn_original_context = 4096  # tokens
    config.yarn_beta_fast = 32.0  # planes with more turns in the original context stay as they are
    config.yarn_beta_slow = 1.0  # planes with fewer turns are slowed by the whole factor
    config.yarn_truncate = True  # round the ramp between the two to whole planes
    config.yarn_attention_factor = 0.0  # scale of rotated q and k; 0: 0.1 ln(yarn_factor) + 1
    config.qk_norm = "none"  # RMSNorm of each query and key head before rotation: none | scaled | unscaled
    config.attention_sink = FieldReference("logit", field_type=object)  # in each softmax, without a value: logit
    # (learned, per head; also True) | zero (its logit is 0) | key (a learned key) | none (also False)
    config.sink_pattern = "S"  # S sinks, N none, repeated over the layers; "SN" with window_pattern "LG": in local ones
    config.attention_gate = "none"  # attention's output times a sigmoid of its input: none | head | channel
    config.exclusive_attention = False  # attention's output loses its component along the token's own value
    config.residual_scalars = False  # each block scales the residual stream, and adds some of what entered the first
    config.sliding_window = 0  # how many keys a query in a local layer sees, its own included; 0: all
    config.window_pattern = "L"  # L local, G global, repeated over the layers: "LG" alternates
    config.qkv_bias = False  # bias of the query, key and value projections
    config.attention_out_bias = False  # bias of the attention's output projection
    config.mlp_bias = True  # biases of the MLP
    config.tie_embeddings = True  # the head is the transposed embedding
    config.logit_softcap = 0.0  # logits become cap * tanh(logits / cap); 0: off
    config.dropout = 0.0  # probability, after the embedding and on each block's two outputs
    config.output_init = "normal"  # projections into the residual stream: normal (0.02) | scaled (GPT-2) | zero
    # zero also starts an untied head at zero

    # --- Data --------------------------------------------------------------------------------------------------
    config.dataset = "tiny_shakespeare"  # tiny_shakespeare | enwik8 | fineweb | a text file | a glob of them |
    # documents: a directory of texts, or .jsonl, .csv, .parquet, .arrow files, compressed or not | tokens: a directory
    # that `main.py prepare` made, or a glob of .bin shards (llm.c, modded-nanogpt, nanoGPT, Megatron-LM)
    config.text_column = "text"  # of rows: the column, or the key of a JSON object, that holds the text
    config.skip_bad_rows = False  # rows without a text are left out and counted, not refused
    config.train_shards = 1  # of fineweb: shards of 100 million tokens to train on, at most 103; other sets use all
    config.tokenizer = "char"  # char | byte | a tiktoken encoding (gpt2, ...) | imported (init_from's) | a directory
    # that `main.py tokenizer` made
    config.unknown_characters = "refuse"  # those that the vocabulary of init_from lacks: refuse | replace | drop
    config.val_fraction = 0.1  # share of the text for validation, after the training part; shards say it by their names
    config.test_fraction = 0.0  # share of the text for testing, at its end
    config.mask_documents = False  # attention does not cross end-of-text tokens; each begins a document
    config.chat = False  # the rows are conversations, lists of messages; only the assistant's are learned
    config.order = "shuffle"  # shuffle (a new order each epoch) | sequential | random (windows anywhere)
    config.data_dir = "data"  # named sets and encoded texts; relative to main.py (installed: to the user's cache)

    # --- Optimizer ---------------------------------------------------------------------------------------------
    config.lr = 3e-4  # peak learning rate of AdamW
    config.muon_lr = 0.02  # peak learning rate of Muon
    config.use_muon = True  # False: AdamW for every parameter
    config.hidden_optimizer = "muon"  # of the 2-D hidden weights: muon | normuon (neurons evened out) | adamw (at lr)
    config.muon_momentum = 0.95  # Nesterov
    config.muon_momentum_start = 0.95  # momentum at step 0
    config.muon_momentum_warmup_steps = 0  # real steps from muon_momentum_start to muon_momentum
    config.newton_schulz = "classical"  # coefficients: classical | polar_express
    config.newton_schulz_steps = 5  # iterations
    config.muon_scale = "aspect"  # aspect: sqrt(max(1, out/in)) | rms: 0.2 sqrt(max(in, out)), to share AdamW's rate
    config.betas = (0.9, 0.95)  # AdamW
    config.eps = 1e-8  # AdamW
    config.weight_decay = 0.0  # decoupled, times the learning rate; never on norms, biases, sinks
    config.decay_embeddings = False  # weight decay on token and position embeddings too
    config.grad_clip = 1.0  # largest global norm of the gradient; 0: off
    config.accumulation_steps = 1  # micro-batches in a real step
    config.schedule = "constant"  # of both rates, after warm-up: constant | cosine | linear | constant_linear
    config.lr_warmup_ratio = 0.0  # share of all steps
    config.decay_ratio = 0.5  # constant_linear: share of all steps that decays, at the end
    config.min_lr_ratio = 0.0  # last learning rate as a share of the peak
    config.ema_decay = 0.0  # of an average of the weights over the last 1 / (1 - ema_decay) real steps or so, evaluated
    # and saved beside them; 0: none is kept

    # --- Training ----------------------------------------------------------------------------------------------
    config.batch_size = 16  # sequences in a micro-batch, over all devices
    config.micro_batch = ""  # "": as above. "8" (any number), or "auto": batch_size is that of a real step, which is
    # made in micro-batches of so many sequences; auto: the most that fit the devices' memory. A run keeps what was
    # found, and is the one that such a batch_size and accumulation_steps give
    config.epochs = 1  # passes over the training text; 0: no limit
    config.max_steps = 0  # real (optimizer) steps; 0: no limit. The run ends at whichever limit comes first
    config.max_flops = 0.0  # floating-point operations of the whole run, as its MFU counts them; 0: no limit
    config.max_seconds = 0.0  # of steps, evaluations and saves, without compilation; 0: no limit. A trial of some
    # seconds fixes the number of steps once, and from then on the run is the one that max_steps would give
    config.seed = 0  # of initial weights, data order and dropout
    config.dtype = "auto"  # of the arithmetic; weights are float32: float32 | bfloat16 | bfloat16_matmul (products of
    # bfloat16, the rest float32; for CPUs) | auto: bfloat16 on GPU and TPU; on a CPU with AMX or AVX512-BF16
    # bfloat16_matmul if its products measure 1.4 times as fast or more, else float32. A run keeps its own
    config.attention_kernel = "auto"  # plain | chunked | cudnn (NVIDIA) | splash (TPU) | auto (what is fastest here)
    config.loss_chunk = 0  # tokens on each device whose logits are in memory at once, for a large vocabulary; 0: all
    config.remat = "none"  # computed again in the backward pass, to save memory: none | dots (all but products with
    # weights) | block (all but each block's input)
    config.scan_blocks = False  # blocks run in a loop, a smaller program; on a CPU it neither compiles nor runs faster
    config.steps_per_dispatch = 1  # micro-steps sent to the devices at once, at most 64; more can help small models
    config.cpu_devices = "auto"  # CPU cores that take part, each a device; auto: the most that divide batch_size
    config.mesh = ""  # devices by axis: "data=2,fsdp=4,sequence=1,tensor=2"; axes left out are 1, and -1 takes the
    # devices that are left. data splits the batch; fsdp the batch, parameters and optimizer; tensor heads, hidden units
    # and the vocabulary; sequence the tokens of each row. "": all devices on data
    config.init_from = ""  # a run's directory: start a new run from the weights of its best checkpoint
    config.init_weights = "auto"  # of init_from: trained | ema (their average) | auto (the average where there is one)
    config.max_bad_steps = 10  # stop after this many real steps in a row without a finite gradient (seen when logged)
    config.spike_sigmas = 6.0  # warn of a loss this many standard deviations above the mean of recent ones; 0: off
    config.skip_spikes = False  # the gradient of such a step is not applied
    config.watchdog_seconds = 1800  # a step or a save that takes longer has hung: exit status 6; 0: wait for ever
    config.peer_seconds = 120  # of several processes: how long to wait for the others to start, and to answer
    config.eval_every = 250  # real steps between evaluations; the last step is always evaluated
    config.eval_tokens = 0  # evaluate on this many tokens of the validation split in training; 0: on all

    # --- Logging -----------------------------------------------------------------------------------------------
    config.run = ""  # name of the run: its directory becomes runs/<run>
    config.log_every = 10  # real steps
    config.sample_every = 0  # real steps between samples; 0: only at the end
    config.sample_prompt = "\n"  # what the samples begin with
    config.sample_tokens = 256  # tokens in a sample
    config.temperature = 0.8  # of the samples; 0 is greedy
    config.report = True  # at each evaluation, measure what heads attend to; at the end, write report.html
    config.print_per_layer_params = False  # list every parameter at the start
    config.trackers = ""  # services that take the numbers too: some of wandb,tensorboard,trackio
    config.wandb_enabled = False  # as trackers="wandb": Weights & Biases, whose settings are in the environment or .env

    # --- Checkpoints -------------------------------------------------------------------------------------------
    config.save_every = 250  # real steps; the last step and each best evaluation are saved too
    config.warning_signal = "save"  # what SIGUSR1 and SIGUSR2 do, which a scheduler sends before it ends a job (SLURM's
    # --signal): save (and go on; several processes at the next logged step) | stop (save, and end with 138 or 140)
    config.keep = 2  # newest checkpoints kept, beside the best one
    return config
