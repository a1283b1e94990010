"""Mistakes that a trainer of this kind can make, each as one small patch, and the fast test that must turn red."""

TRANSFORMS, BRANCH, STEP = (f"tests/methods/test_{name}.py::test_" for name in ("transforms", "dual_branch", "step"))
SINKHORN, CENTER, ALIGN = (
    f"tests/methods/test_{name}.py::test_" for name in ("sinkhorn", "center_sharpen", "alignment")
)
EIGENSPACES, INSTRUMENTS = (
    "tests/analysis/test_branch_comparison.py::test_",
    "tests/analysis/test_spectral_analysis.py::test_",
)
GRADIENTS = "tests/runtime/test_gradients.py::test_loss_and_gradient_do_not_depend_on_the_number_of_processes"
REACH = "tests/test_settings_reach.py::test_"
PRESETS = "tests/methods/test_presets.py::test_"
PLAIN = "tests/methods/test_published.py::test_loss_gradients_and_statistics_equal_the_plain_version"
REGULAR, TARGETS, WHITEN, CLOSED = (
    f"tests/methods/test_{name}.py::test_" for name in ("regularizers", "many_targets", "whiten", "closed_form")
)
FORMULA = f"{REGULAR}value_and_gradient_equal_the_formula"
VERDICT = "tests/monitoring/test_verdict.py::test_"
SHARE = "tests/monitoring/test_monitor.py::test_where_moments_are_large_a_window_takes_a_share_of_more_batches"
AUTOMATIC = "tests/training/test_automatic.py::test_a_cpu_stays_eager_and_takes_bf16_where_it_pays"
PARITY = "tests/training/test_parity.py::test_processes_do_not_change_the_run"
TO_THE_LEFT = """lambda x, *rest, **named: spectral_filter(x, *rest, **named) if self.side == "target" else (
            spectral_filter(x.detach(), *rest, **named) @ x.detach().pinverse() @ x
        )"""

# of each file: the mistake, what stands there once, what takes its place, the test that is killed by it
MUTANTS: dict[str, list[tuple[str, str, str, str]]] = {
    "fastrdm/methods/stop.py": [
        ("stop-gradient dropped", "return x.detach()", "return x", f"{PLAIN}[simsiam]"),
    ],
    "fastrdm/methods/sinkhorn.py": [
        (
            "epsilon moves the other way",
            "linear_ramp(step, self.warmup, self.config.warmup_epsilon, self.config.epsilon)",
            "linear_ramp(step, self.warmup, self.config.epsilon, self.config.warmup_epsilon)",
            f"{CLOSED}sinkhorns_epsilon_moves_along_a_line",
        ),
        (
            "epsilon of the settings not taken",
            "sinkhorn_knopp(x, self.epsilon, self.config.iterations)",
            "sinkhorn_knopp(x, 0.05, self.config.iterations)",
            f"{REACH}sinkhorn_epsilon_and_iterations[0.2-3]",
        ),
        (
            "iterations of the settings not taken",
            "sinkhorn_knopp(x, self.epsilon, self.config.iterations)",
            "sinkhorn_knopp(x, self.config.epsilon, 3)",
            f"{REACH}sinkhorn_epsilon_and_iterations[0.05-7]",
        ),
        (
            "prototypes' mass summed over this process only",
            "sum_over_processes(q.sum(1, keepdim=True))",
            "q.sum(1, keepdim=True)",
            f"{PARITY}[fp64-swav-2]",
        ),
        (
            "each process with its own largest score",
            "max_over_processes(scores.amax((1, 2), keepdim=True))",
            "scores.amax((1, 2), keepdim=True)",
            f"{PARITY}[fp64-swav-2]",
        ),
        (
            "one iteration short",
            "for _ in range(iterations):",
            "for _ in range(iterations - 1):",
            f"{SINKHORN}assignments_equal_the_published_iterations",
        ),
        (
            "queue written from the wrong end",
            "(self.pointer + torch.arange(features.shape[1], device=features.device))",
            "(self.pointer - 1 - torch.arange(features.shape[1], device=features.device))",
            f"{SINKHORN}the_queue_is_a_ring_of_unit_features",
        ),
        (
            "queue whose newest part is overwritten",
            "self.pointer.copy_((self.pointer + features.shape[1]) % self.queue.shape[1])",
            "self.pointer.copy_((self.pointer + features.shape[1]).clamp(max=self.queue.shape[1] - features.shape[1]))",
            f"{SINKHORN}the_queue_is_a_ring_of_unit_features",
        ),
        (
            "queue used before it is full",
            "step >= max(self.start, self.fill)",
            "step >= self.start",
            f"{SINKHORN}the_queue_joins_when_it_is_due_and_full[0st-3]",
        ),
        (
            "queue of this process's features only",
            "self._push(gather_rows(F.normalize(branch.scored, dim=-1), dim=1))",
            "self._push(F.normalize(branch.scored, dim=-1))",
            f"{PARITY}[fp64-swav-2]",
        ),
        (
            "queue not in the checkpoint",
            "torch.zeros(context.target_views, config.queue, context.width))",
            "torch.zeros(context.target_views, config.queue, context.width), persistent=False)",
            f"{SINKHORN}the_queue_is_a_ring_of_unit_features",
        ),
    ],
    "fastrdm/methods/center_sharpen.py": [
        (
            "center of this process only",
            "sum_over_processes(x.mean((0, 1))) / process_count()",
            "x.mean((0, 1))",
            f"{PARITY}[fp64-dino-2]",
        ),
        (
            "center added",
            "(x - self.center)",
            "(x + self.center)",
            f"{CENTER}probabilities_and_center_equal_their_formulas",
        ),
        (
            "center of the first view",
            "x.mean((0, 1))",
            "x[0].mean(0)",
            f"{CENTER}probabilities_and_center_equal_their_formulas",
        ),
        (
            "temperatures swapped: sharp at the end",
            "self.config.warmup_temperature, self.config.temperature)",
            "self.config.temperature, self.config.warmup_temperature)",
            f"{CENTER}the_temperature_warms_up",
        ),
    ],
    "fastrdm/methods/alignment.py": [
        (
            "a view's own target in the mean of the others",
            "others = [(v, [t for t in range(targets) if t != v]) for v in range(views)]",
            "others = [(v, list(range(targets))) for v in range(views)]",
            f"{TARGETS}a_view_meets_the_mean_of_the_other_targets[4-4-mean]",
        ),
        (
            "the loss's weight not taken",
            "return config.weight * (total",
            "return (total",
            f"{TARGETS}a_view_meets_the_mean_of_the_other_targets[4-4-mean]",
        ),
        (
            "both directions counted once",
            "[(v, [t], 2 if v < targets else 1) for v, t in pairs if v > t]",
            "[(v, [t], 1) for v, t in pairs if v > t]",
            f"{TARGETS}directions_that_are_the_same_number_are_computed_once[4-2-mse-mean]",
        ),
        ("each view paired with itself", "if t != v]", "if t == v]", f"{PLAIN}[simsiam]"),
        (
            "a view's own target among its pairs",
            "if t != v]",
            "]",
            f"{ALIGN}each_global_target_meets_every_other_view[mean-negative_cosine-5]",
        ),
        ("directions averaged whatever is asked", ' if config.directions == "mean" else total', "", f"{PLAIN}[byol]"),
    ],
    "fastrdm/methods/losses.py": [
        (
            "correlation of this process",
            "c = sum_with_gradient(p.mT @ z) / rows",
            "c = p.mT @ z / len(p)",
            f"{GRADIENTS}[2-eager-cross_correlation]",
        ),
        (
            "the temperature of the settings not taken",
            "(online / config.temperature).log_softmax",
            "(online / 0.1).log_softmax",
            f"{REACH}alignment_temperature[0.7]",
        ),
        (
            "scores multiplied by the temperature",
            "(online / config.temperature).log_softmax",
            "(online * config.temperature).log_softmax",
            f"{ALIGN}cross_entropy_equals_its_formula",
        ),
    ],
    "fastrdm/methods/presets.py": [
        (
            "BYOL's directions averaged",
            '{"name": "byol", "directions": "sum"}',
            '{"name": "byol"}',
            f"{PRESETS}recipes[byol]",
        ),
    ],
    "fastrdm/methods/dual_branch.py": [
        (
            "the projector syncs BatchNorm whatever is asked",
            "Head(config.projector, encoder.features, sync_bn)",
            "Head(config.projector, encoder.features)",
            f"{REACH}sync_bn_of_projector_and_predictor[False]",
        ),
        (
            "basis of the same view's partner branch",
            "BranchContext(z.projection[:2].flip(0).detach()",
            "BranchContext(z.projection[:2].detach()",
            f"{PLAIN}[rdm_imagenet]",
        ),
        (
            "projector's last layers in 16 bits",
            "with torch.autocast(device, enabled=False):",
            "with torch.autocast(device, precision) if precision else nullcontext():",
            f"{BRANCH}under_autocast_everything_from_the_last_norm_on_is_float32[rdm_byol-precision0]",
        ),
        (
            "prototypes frozen a step too long",
            "self.frozen = step < self.freeze",
            "self.frozen = step <= self.freeze",
            f"{STEP}prototypes_are_frozen_for_as_long_as_told",
        ),
        (
            "moving average of BatchNorm's buffers too",
            "ema_update(list(self.target.parameters()), list(self.online.parameters()), self.momentum)",
            "ema_update(*([*n.parameters(), *(b for b in n.buffers() if b.is_floating_point())] "
            "for n in (self.target, self.online)), self.momentum)",
            f"{BRANCH}the_target_follows_the_parameters_after_the_step[0-0.9]",
        ),
        (
            "momentum that stays where it starts",
            "cosine_ramp(step, self.horizon.total,",
            "cosine_ramp(0, self.horizon.total,",
            f"{BRANCH}the_target_follows_the_parameters_after_the_step[10-0.95]",
        ),
        (
            "BatchNorm over both views of the encoder",
            "set_views(self.encoder, len(views) if self.per_view else 1)",
            "set_views(self.encoder, 1)",
            f"{PLAIN}[byol]",
        ),
        (
            "the projector's BatchNorm over both views",
            "set_views(self.projector, count if self.per_view else 1)",
            "set_views(self.projector, 1)",
            f"{PLAIN}[byol]",
        ),
        (
            "the target drops paths like the student",
            "module.drop_prob = 0.0",
            "pass",
            "tests/methods/test_multicrop.py::test_the_target_of_a_vit_drops_no_path",
        ),
        (
            "BatchNorm over both views of the predictor",
            "set_views(transforms, len(x) if self.online.per_view else 1)",
            "set_views(transforms, 1)",
            f"{PLAIN}[simsiam]",
        ),
        (
            "SimSiam's predictor follows the schedule",
            '"constant" if transform.constant_lr else "cosine"',
            '"cosine"',
            f"{STEP}rates_follow_the_step_and_simsiams_predictor_keeps_its_own",
        ),
    ],
    "fastrdm/methods/transform_settings.py": [
        (
            "weights of an isotropic gradient keep their scale",
            'return config.epsilon > 0 or config.gradient == "isotropic"',
            "return config.epsilon > 0",
            f"{CLOSED}an_isotropic_gradient_is_isoloss[0.998]",
        ),
    ],
    "fastrdm/methods/spectral_filter.py": [
        (
            "no floor under the weights",
            "return out + self.config.epsilon * x if self.config.epsilon else out",
            "return out",
            f"{CLOSED}a_floor_alone_keeps_each_views_own_spectrum",
        ),
        (
            "an isotropic gradient goes through the filter",
            'if self.config.gradient == "isotropic":\n            # The values',
            'if self.config.gradient == "none":\n            # The values',
            f"{CLOSED}an_isotropic_gradient_is_isoloss[None]",
        ),
        (
            "the moving moment begins at zero",
            "kept = (self.steps > 0).to(batch.dtype) * self.config.momentum",
            "kept = torch.full_like(batch[0, 0], self.config.momentum)",
            f"{CLOSED}directpred_and_directcopy_are_filters[1.0-0.1-0.3]",
        ),
        (
            "a predictor of the power above",
            '"power", c.power - 1, side="target"',
            '"power", c.power, side="target"',
            f"{CLOSED}the_cross_correlations_basis[0.0]",
        ),
        (
            "rounding of a moment is amplified",
            "max(CUTOFF[x.dtype], torch.finfo(x.dtype).eps ** 0.5) if c.cutoff is None else c.cutoff",
            "c.cutoff",
            f"{CLOSED}a_moving_moment_of_a_target_drops_what_rounding_left",
        ),
        (
            "the exponent stays",
            "self.weighting.power.fill_(linear_ramp(step, self.anneal, self.config.power, self.config.power_end))",
            "self.weighting.power.fill_(self.config.power)",
            f"{CLOSED}the_exponent_moves_along_a_line",
        ),
        (
            "the solver of the settings not taken",
            "            solver=c.solver,\n",
            "",
            f"{REACH}filter_solver",
        ),
        (
            "the rows of process 0 on every process",
            "offset=process_rank() * x.shape[1]",
            "offset=0",
            f"{REACH}rows_of_a_spectral_filter_are_those_of_its_process[2]",
        ),
        (
            "filter from the left: the same value, another gradient",
            "return spectral_filter(\n            x,\n",
            f"return ({TO_THE_LEFT})(\n            x,\n",
            f"{TRANSFORMS}the_online_filter_is_x_w_with_gradient_g_w[raw-3-log1p]",
        ),
        (
            "target filter with gradient",
            "return self._weighted(x.detach(), branch)\n        if",
            "return self._weighted(x, branch)\n        if",
            f"{TRANSFORMS}no_target_filter_has_a_gradient[more0]",
        ),
        (
            "filter of this process's rows only",
            "x_all=gather_rows(x, dim=1)",
            "x_all=x",
            f"{PARITY}[fp64-rdm_simsiam_log1p-2]",
        ),
    ],
    "kernels/collectives.py": [
        (
            "gradient of a gather from this process's loss only",
            'return reduce_over_processes(grad, "sum")[process_rank()]',
            "return grad[process_rank()]",
            f"{GRADIENTS}[2-eager-contrastive]",
        ),
        (
            "gradient of a sum from this process's loss only",
            """        return reduce_over_processes(grad, "sum")

""",
            """        return grad

""",
            f"{GRADIENTS}[2-eager-covariance]",
        ),
    ],
    "fastrdm/methods/prototypes.py": [
        (
            "prototypes not of unit length",
            "F.normalize(self.weight, dim=-1)",
            "self.weight",
            f"{TRANSFORMS}prototypes_are_cosines_and_differentiate_like_weight_norm",
        ),
    ],
    "kernels/spectral/custom_op.py": [
        (
            "filter without its gradient's W",
            "return _apply_op(grad, *ctx.saved_tensors, ctx.precision), *[None] * 10",
            "return grad, *[None] * 10",
            f"{PLAIN}[rdm_byol_log1p]",
        ),
    ],
    "kernels/spectral/filter_factors.py": [
        (
            "power off by one",
            "return s**self.power",
            "return s ** (self.power + 1)",
            f"{TRANSFORMS}power_is_the_exponent_of_the_multiplier[-0.5]",
        ),
    ],
    "fastrdm/training/step.py": [
        (
            "the rate of a part of the batch",
            "scale=c.loader.batch_size / 256",
            "scale=c.loader.batch_size / c.train.accumulate / 256",
            f"{REACH}the_rate_does_not_hang_on_accumulation",
        ),
        (
            "target moved before the optimizer's step",
            "self.scaler.step(self.optimizer)",
            "self.method.after_step(), self.scaler.step(self.optimizer)",
            f"{STEP}the_target_follows_what_the_step_made",
        ),
        (
            "rate that changes with the epoch only",
            "learning_rates(self.groups, step,",
            "learning_rates(self.groups, step - step % self.horizon.steps_per_epoch,",
            f"{STEP}rates_follow_the_step_and_simsiams_predictor_keeps_its_own",
        ),
        (
            "accumulated gradients summed",
            "self.scaler.scale(loss / self.parts)",
            "self.scaler.scale(loss)",
            f"{STEP}accumulation_averages_the_gradients_of_the_parts",
        ),
    ],
    "kernels/ema.py": [
        (
            "momentum and its complement swapped",
            "(1 - momentum).to",
            "momentum.to",
            "tests/kernels/test_ema.py::test_equals_its_formula[0.99]",
        ),
    ],
    "kernels/batchnorm.py": [
        (
            "BatchNorm of this process's rows only",
            "parts = gather_over_processes(own)",
            "parts = own[None]",
            f"{PARITY}[fp64-simsiam-2]",
        ),
        (
            "BatchNorm's gradient of this process's rows only",
            'reduce_over_processes(own, "sum")',
            "own",
            f"{PARITY}[fp64-simsiam-2]",
        ),
    ],
    "fastrdm/optim/optimizers.py": [
        (
            "LAMB's betas not taken",
            "Lamb(own, betas=config.betas)",
            "Lamb(own, betas=(0.9, 0.999))",
            f"{REACH}betas_of_lamb_and_adam",
        ),
        (
            "LARS adapts and decays biases and norms",
            "excluded, role, config, scale, 0.0, False)",
            "excluded, role, config, scale, decay, role.adapt)",
            f"{PRESETS}groups[byol]",
        ),
    ],
    "kernels/optimizers.py": [
        (
            "LARS clipped without the rate",
            'local = (local / group["lr"]).clamp(max=1)',
            "local = local.clamp(max=1)",
            "tests/optim/test_optimizers.py::test_lars_follows_its_formula[True-True]",
        ),
    ],
    "loaders/order.py": [
        (
            "each process draws its own order",
            "epoch_order(self.samples, self.seed, self.epoch, self.shards, self.window)[",
            "epoch_order(self.samples, self.seed + self.rank, self.epoch, self.shards, self.window)[",
            f"{PARITY}[fp64-symsimsiam-2]",
        ),
    ],
    "loaders/augment/reference.py": [
        (
            "solarized at 128 whatever is asked",
            "spec.solarize_threshold / 255",
            "128 / 255",
            f"{REACH}solarize_threshold_of_the_reference[32]",
        ),
        (
            "jitter in the inverse of the drawn order",
            "order = parameters[:, Column.ORDER : Column.ORDER + 4]",
            "order = parameters[:, Column.ORDER : Column.ORDER + 4].argsort(1).float()",
            "tests/loaders/augment/test_reference.py::test_jitter_in_every_order",
        ),
        (
            "normalized before solarized",
            "x = solarize(x, parameters[:, Column.SOLARIZE], spec.solarize_threshold / 255)\n"
            "    return normalize(x, spec.mean, spec.std, dtype)",
            "return solarize(normalize(x, spec.mean, spec.std, dtype), parameters[:, Column.SOLARIZE], "
            "spec.solarize_threshold / 255)\n    return normalize(x, spec.mean, spec.std, dtype)",
            "tests/methods/test_views.py::test_solarized_before_normalized[reference]",
        ),
    ],
    "kernels/augment/augment_triton.py": [
        (
            "Triton: flipped, but from the pixels of the tile that is not",
            "tl.where(flip, size - 1 - last_x, x0), tl.where(flip, size - 1 - x0, last_x)",
            "x0, last_x",
            "tests/kernels/augment/test_augment_triton.py::test_crop_of_odd_sizes[triton-33-bilinear]",
        ),
        (
            "Triton: green read beside red, where the channels are planes",
            "tl.load(at + channel, mask",
            "tl.load(at + 1, mask",
            "tests/kernels/augment/test_augment_triton.py::"
            "test_images_where_they_lie_give_the_views_of_one_buffer_bit_for_bit[bilinear]",
        ),
    ],
    "kernels/augment/parameters_triton.py": [
        (
            "Triton: the last box that fits, not the first",
            "(w <= columns) & (found == 0)",
            "(w <= columns)",
            "tests/kernels/augment/test_parameters_triton.py::test_the_draw_is_the_references_bit_for_bit[0]",
        ),
    ],
    "loaders/engines/native.py": [
        (
            "files: every view with the first one's crop",
            "zip(self.epoch_views, drawn, strict=True)",
            "zip(self.epoch_views, [drawn[0]] * len(drawn), strict=True)",
            "tests/methods/test_views.py::test_each_view_has_its_own_draw[native]",
        ),
    ],
    "loaders/engines/resident.py": [
        (
            "every view with the first one's crop",
            "zip(drawn, specs, strict=True)",
            "zip([drawn[0]] * len(specs), specs, strict=True)",
            "tests/methods/test_views.py::test_each_view_has_its_own_draw[resident]",
        ),
    ],
    "fastrdm/analysis/branch_comparison.py": [
        (
            "variances of the images that the directions come from",
            "for x in (o2, t2)])",
            "for x in (o1, t1)])",
            f"{EIGENSPACES}variances_are_those_of_the_images_that_the_directions_do_not_come_from",
        ),
        (
            "directions of the target alone",
            "(second_moment(o1) + second_moment(t1)) / 2",
            "second_moment(t1)",
            f"{EIGENSPACES}a_whitened_target_still_shows_the_low_pass_online_branch",
        ),
        (
            "an interval around the biased figure",
            "2 * value - others.mean()",
            "value",
            f"{EIGENSPACES}the_interval_holds_the_difference_of_infinitely_many_images",
        ),
        (
            "the bootstrap mean not taken off where asked",
            "if center:\n            moment",
            "if not center:\n            moment",
            f"{EIGENSPACES}rank_difference_equals_that_of_the_joined_rows[True]",
        ),
    ],
    "fastrdm/analysis/spectral_analysis.py": [
        (
            "buffers left as the measurement made them",
            "buffer.copy_(before)",
            "pass",
            f"{INSTRUMENTS}nothing_of_the_method_or_of_chance_is_changed[swav]",
        ),
        (
            "rows of this process alone",
            "gather_rows(part[:2], dim=1)",
            "part[:2]",
            f"{INSTRUMENTS}every_process_gets_the_figures_of_one",
        ),
    ],
    "fastrdm/training/periodic_analysis.py": [
        (
            "measured on views of training",
            "seed=settings.train.seed + OTHER",
            "seed=settings.train.seed",
            "tests/commands/test_analyze.py::test_views_are_none_of_training",
        ),
    ],
    "fastrdm/monitoring/verdict.py": [
        (
            "a large mean of the online branch called a collapse",
            "online.deviation < least and online.rank < ONLINE_RANK",
            "online.deviation < least",
            f"{VERDICT}complete_collapse_of_the_online_branch_leaves_one_direction",
        ),
        (
            "a low rank of the online branch called a collapse",
            "if target.rank < DIMENSIONAL_RANK:",
            "if min(target.rank, online.rank) < DIMENSIONAL_RANK:",
            f"{VERDICT}dimensional_collapse_is_a_low_rank_of_the_target_about_its_mean",
        ),
        (
            "the best accuracy in place of the newest",
            "newest, best = self.accuracies[-1], max(self.accuracies)",
            "newest = best = max(self.accuracies)",
            f"{VERDICT}weak_is_a_run_that_fell_from_its_best",
        ),
        (
            "no alarm called healthy",
            "if not self.accuracies:",
            "if False:",
            f"{VERDICT}what_is_not_judged_says_why",
        ),
        (
            "small batches judged",
            "images >= LEAST_IMAGES else",
            "images > 0 else",
            f"{VERDICT}batches_that_are_too_small_are_not_judged_but_windows_are",
        ),
        (
            "fewer readings than needed judged",
            "deque(maxlen=READINGS)).append",
            "deque([value] * READINGS, READINGS)).append",
            f"{VERDICT}what_is_not_judged_says_why",
        ),
    ],
    "fastrdm/methods/predictor.py": [
        (
            "the predictor syncs BatchNorm whatever is asked",
            "Head(head, context.width, context.sync_bn)",
            "Head(head, context.width)",
            f"{REACH}sync_bn_of_projector_and_predictor[False]",
        ),
    ],
    "fastrdm/evaluation/evaluator.py": [
        (
            "eval's k-NN temperature not taken",
            "config.k, config.temperature, self.tops",
            "config.k, 0.07, self.tops",
            f"{REACH}knn_temperature_of_eval",
        ),
    ],
    "fastrdm/evaluation/finetune.py": [
        (
            "fine-tuning's rate whatever the batch",
            "scale=batch_size / 256",
            "scale=1.0",
            f"{REACH}rates_of_fine_tuning_are_of_256_images",
        ),
    ],
    "fastrdm/monitoring/rank_statistics.py": [
        (
            "the interval of a known mean",
            "variance = groups / (groups - 1) * ",
            "variance = ",
            f"{REACH}the_interval_of_groups_is_students",
        ),
    ],
    "kernels/linalg/effective_rank.py": [
        (
            "the slope begins one index late",
            "index >= first",
            "index > first",
            f"{REACH}the_slope_begins_at_its_first_index[4]",
        ),
    ],
    "fastrdm/monitoring/monitor.py": [
        (
            "more groups than images",
            "config.groups if images >= config.groups > 0 else 1",
            "max(config.groups, 1)",
            f"{REACH}without_an_image_for_each_group_there_are_no_groups[7-1]",
        ),
        (
            "a window may end after the next begins",
            "min(SPREAD, min(self.every, self.horizon.total) // batches",
            "min(SPREAD, self.horizon.total // batches",
            SHARE,
        ),
    ],
    "fastrdm/monitoring/window.py": [
        ("the first images of a batch, not a share", "x[:, :: self.shape.spread]", "x[:, : x.shape[1] // 4]", SHARE),
    ],
    "fastrdm/training/automatic.py": [
        (
            "bf16 on any CPU",
            '("bf16", "native on this CPU") if cpu_multiplies_bf16() else ("fp32", "this CPU has no AVX512_BF16")',
            '("bf16", "native on this CPU")',
            f"{AUTOMATIC}[False-resnet18-fp32-this CPU has no AVX512_BF16]",
        ),
    ],
    "loaders/spec.py": [
        (
            "blur stays in a plain view",
            "dict.fromkeys(OPERATIONS, 0.0)",
            'dict.fromkeys([name for name in OPERATIONS if name != "blur"], 0.0)',
            f"{REACH}crop_and_flip_leaves_no_other_operation",
        ),
    ],
    "kernels/spectral/matmul_solvers.py": [
        (
            "the dominant direction without its weight",
            "torch.baddbmm(out.double(), left[:, rows] * weight, right.mT)",
            "torch.baddbmm(out.double(), left[:, rows] * 0 * weight, right.mT)",
            "tests/kernels/spectral/test_matmul_solvers.py::test_rows_that_are_all_alike_have_one_direction_and_no_noise_is_raised",
        ),
    ],
    "fastrdm/methods/regularizer.py": [
        (
            "centered by this process's mean",
            "sum_with_gradient(x.sum(-2, keepdim=True)) / row_count(x)",
            "x.mean(-2, keepdim=True)",
            f"{GRADIENTS}[2-eager-regularizer_variance]",
        ),
        (
            "no diagonal taken off",
            "return matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))",
            "return matrix",
            f"{FORMULA}[covariance-shape0-random]",
        ),
    ],
    "fastrdm/methods/regularizers.py": [
        (
            "variance over n",
            "(row_count(x) - 1)\n        return F.relu",
            "row_count(x)\n        return F.relu",
            f"{FORMULA}[variance-shape0-random]",
        ),
        (
            "no hinge: large deviations are rewarded",
            "F.relu(self.config.goal - (variance + self.config.epsilon).sqrt()).mean()",
            "(self.config.goal - (variance + self.config.epsilon).sqrt()).mean()",
            f"{FORMULA}[variance-shape0-large]",
        ),
        (
            "covariance of few rows with its diagonal",
            "return (every - diagonal.square().sum(-1)).mean() / width",
            "return every.mean() / width",
            f"{FORMULA}[covariance-shape1-random]",
        ),
        (
            "coding rate of rows as they are",
            "x, n, width = F.normalize(x, dim=-1), row_count(x), x.shape[-1]\n        if n >= width:",
            "n, width = row_count(x), x.shape[-1]\n        if n >= width:",
            f"{FORMULA}[coding_rate-shape0-large]",
        ),
        (
            "the coding rate is lowered",
            "return -rate.mean() * (n + width) / (n * width)",
            "return rate.mean() * (n + width) / (n * width)",
            f"{REGULAR}the_coding_rate_counts_directions",
        ),
        (
            "the nearest neighbor is the row itself",
            "similarity.scatter_(1, itself.unsqueeze(-1), -2.0)",
            "",
            f"{FORMULA}[koleo-shape0-random]",
        ),
        (
            "each process takes its own rows for those of the first",
            "torch.arange(len(x), device=x.device) + process_rank() * len(x)",
            "torch.arange(len(x), device=x.device)",
            f"{GRADIENTS}[2-eager-regularizer_koleo]",
        ),
        (
            "neighbors of this process only",
            "everyone = gather_rows_with_gradient(x)",
            "everyone = x",
            f"{GRADIENTS}[2-eager-regularizer_koleo]",
        ),
        (
            "characteristic functions of this process",
            "phi = sum_with_gradient(_Characteristic.apply(along, step, knots)) / n",
            "phi = _Characteristic.apply(along, step, knots) / x.shape[1]",
            f"{GRADIENTS}[2-eager-regularizer_sigreg]",
        ),
        (
            "the sine's gradient with the wrong sign",
            "out = out + by[..., 1] * c - by[..., 0] * s",
            "out = out + by[..., 1] * c + by[..., 0] * s",
            f"{FORMULA}[sigreg-shape0-random]",
        ),
        (
            "every frequency in full at the ends of the integral",
            "weights[0] = weights[-1] = step",
            "",
            f"{FORMULA}[sigreg-shape0-random]",
        ),
        (
            "the same slices at every step",
            "torch.Generator(self.slices.device).manual_seed(step)",
            "torch.Generator(self.slices.device).manual_seed(0)",
            f"{REGULAR}slices_are_unit_vectors_that_depend_on_the_step_alone[sigreg]",
        ),
        (
            "gradient through the deviation that the shape is divided by",
            "(deviation.detach() + c.epsilon)",
            "(deviation + c.epsilon)",
            f"{FORMULA}[visreg-shape0-random]",
        ),
        (
            "TiCo's matrix moves where only a measurement is made",
            "            if self.training:\n                self.moment.copy_(moment)",
            "            self.moment.copy_(moment)",
            f"{REGULAR}the_moving_matrix_of_tico[0.9]",
        ),
        (
            "TiCo's matrix not in the checkpoint",
            "torch.zeros(context.width, context.width))",
            "torch.zeros(context.width, context.width), persistent=False)",
            f"{REGULAR}the_moving_matrix_of_tico[0.9]",
        ),
        (
            "TiCo's matrix of this process",
            "sum_over_processes(rows.mT @ rows) / (row_count(x) * len(x))",
            "rows.mT @ rows / len(rows)",
            f"{GRADIENTS}[2-eager-regularizer_tico]",
        ),
        (
            "nuclear norm of the rows of this process",
            "x_all=rows, offset=first, side",
            "side",
            f"{GRADIENTS}[2-eager-regularizer_nuclear]",
        ),
    ],
    "fastrdm/methods/whiten.py": [
        (
            "whitened by n",
            "(count - 1))",
            "count)",
            f"{WHITEN}the_covariance_becomes_the_identity[zca]",
        ),
        (
            "the root's slope of another power",
            "slopes = -product / torch.where(both == 0, 1.0, both)",
            "slopes = -product / torch.where(both == 0, 1.0, both) / 2",
            f"{WHITEN}value_and_gradient_equal_the_definition[1.0-0.0-zca]",
        ),
        (
            "rows come back in the drawn order",
            "return out[:, self.order.argsort()][:, first",
            "return out[:, first",
            f"{WHITEN}parts_are_random_disjoint_alike_for_views_and_of_the_step_alone",
        ),
        (
            "the same parts at every step",
            "torch.Generator().manual_seed(step)",
            "torch.Generator().manual_seed(0)",
            f"{WHITEN}parts_are_random_disjoint_alike_for_views_and_of_the_step_alone",
        ),
    ],
}
