// Checkpoints: the weights, moments and step of a training run in one safetensors file, and training loops that keep
// them.
//
// A run that is killed and resumed ends with the same bits: the file holds everything a step depends on beside the
// data, which is a function of the step.
#pragma once

#include <calm/io/folder.hpp>
#include <calm/io/safetensors.hpp>
#include <calm/train/trainer.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>

namespace calm::inline CALM_ABI {

/// The trainable weights of a model under their names, and nothing else.
template <class Model>
void save_parameters(const Model& model, const std::filesystem::path& path,
                     std::map<std::string, std::string> metadata = {}) {
  SafetensorsWriter writer;
  for_each_parameter(model, [&](const std::string& name, const auto& parameter) {
    writer.add(name, parameter.shape(), parameter.value.values());
  });
  for (auto& [key, value] : metadata) writer.set_metadata(key, std::move(value));
  writer.write(path);
}

/// Sets every trainable weight from a file; all must be there, with their shapes.
template <class Model>
void load_parameters(Model& model, const SafetensorsFile& file, const std::string& prefix = "") {
  for_each_parameter(model, [&](const std::string& name, auto& parameter) {
    const StoredMatrix stored = file.matrix(prefix + name, parameter.value.rows(), parameter.value.cols());
    stored.read_rows(0, stored.rows(), parameter.value.data());
  });
}

/// Throws NumericError, with `consequence` in its message, where a weight is not finite.
template <class Model, class... Parts>
void check_weights(Trainer<Model, Parts...>& trainer, const std::string& consequence = "") {
  const std::string bad = find_not_finite(trainer.model());
  require<NumericError>(bad.empty(), "after training step ", trainer.step_count(), " a weight of ", bad, consequence,
                        ". A lower learning rate may help.");
}

/// Throws NumericError, leaving the file that is there as it is, where a weight is not finite.
template <class Model, class... Parts>
void save_checkpoint(Trainer<Model, Parts...>& trainer, const std::filesystem::path& path, double best_loss,
                     const std::string& fingerprint) {
  check_weights(trainer, message("; ", path.string(), " stays as it was"));
  SafetensorsWriter writer;
  for_each_parameter(trainer.model(), [&](const std::string& name, auto& parameter) {
    writer.add(name, parameter.shape(), std::as_const(parameter.value).values());
  });
  writer.add("optimizer.first_moment", trainer.optimizer().first_moment());
  writer.add("optimizer.second_moment", trainer.optimizer().second_moment());
  writer.set_metadata("optimizer", std::string(trainer.optimizer_name));
  writer.set_metadata("step", std::to_string(trainer.step_count()));
  Matrix<double> best(1, 1);
  best(0, 0) = best_loss;
  writer.add("best_validation_loss", best);
  writer.set_metadata("fingerprint", fingerprint);
  writer.write(path);
}

/// Restores a trainer and returns the best validation loss so far. Throws FormatError where the file is of another run
/// or damaged, and then leaves the trainer as it was.
template <class Model, class... Parts>
double load_checkpoint(Trainer<Model, Parts...>& trainer, const std::filesystem::path& path,
                       const std::string& fingerprint) {
  const SafetensorsFile file(path);
  const auto value = [&](const char* key) {
    const auto found = file.metadata().find(key);
    require<FormatError>(found != file.metadata().end(), path.string(), ": no \"", key,
                         "\" in the metadata; this is no checkpoint");
    return found->second;
  };
  require<FormatError>(value("fingerprint") == fingerprint, path.string(),
                       ": the checkpoint belongs to a run with other options (", printable(value("fingerprint"), 1000),
                       "), this run has (", fingerprint, "); use another folder or start anew");
  const std::string optimizer_name = file.metadata().contains("optimizer") ? value("optimizer") : "AdamW";
  require<FormatError>(optimizer_name == trainer.optimizer_name, path.string(), ": the checkpoint's moments are of ",
                       in_quotes(optimizer_name), ", this run trains with ", trainer.optimizer_name,
                       "; use another folder or start anew");
  const std::string step_text = value("step");
  Index step = -1;
  const auto [end, error] = std::from_chars(step_text.data(), step_text.data() + step_text.size(), step);
  require<FormatError>(error == std::errc{} && end == step_text.data() + step_text.size() && step >= 0, path.string(),
                       ": \"step\" in the metadata is ", in_quotes(step_text), ", expected a count of steps");
  const double best = file.matrix("best_validation_loss", 1, 1).dense<double>()(0, 0);
  using Scalar = typename Model::Scalar;
  const auto read = [&](const std::string& name, Index rows, Index cols) {
    return file.matrix(name, rows, cols).dense<Scalar>();
  };
  auto& optimizer = trainer.optimizer();
  Matrix<Scalar> first = read("optimizer.first_moment", 1, optimizer.first_moment().cols());
  Matrix<Scalar> second = read("optimizer.second_moment", 1, optimizer.second_moment().cols());
  for_each_parameter(trainer.model(), [&](const std::string& name, auto& parameter) {
    file.matrix(name, parameter.value.rows(), parameter.value.cols());  // throws where it is not there as it must be
  });
  load_parameters(trainer.model(), file);
  std::copy_n(first.data(), first.size(), optimizer.first_moment().data());
  std::copy_n(second.data(), second.size(), optimizer.second_moment().data());
  trainer.resume_at(step);
  return best;
}

/// What a training loop does beside its steps. Paths are files in `folder`: last.safetensors and best.safetensors.
struct RunOptions {
  std::filesystem::path folder = {};  // empty: nothing is written
  Index checkpoint_every = 0;         // steps; 0: only at the end
  Index validate_every = 0;           // steps; 0: only at the end, where there is validation data
  bool resume = false;                // go on from last.safetensors where it exists
  std::string fingerprint = {};       // of data and options: a checkpoint of another is refused
};

struct StepReport {
  Index step = 0;
  StepResult result;
  double learning_rate = 0;
  double validation_loss = std::numeric_limits<double>::quiet_NaN();  // where it was measured after this step
};

/// Runs the schedule's steps: batches(step) gives the TrainingBatches of a step counted from 0, validate() the
/// validation loss (may be empty), report(StepReport) is called after each step. With validation the model ends with
/// the weights of the best loss, which is returned (NaN without). A NumericError, also for a validation loss that is
/// not finite, leaves the last good checkpoint in place.
template <class Model, class... Parts>
double run_training(Trainer<Model, Parts...>& trainer,
                    const std::function<std::vector<TrainingBatch<Model>>(Index)>& batches, const RunOptions& options,
                    const std::function<double()>& validate = {},
                    const std::function<void(const StepReport&)>& report = {}) {
  const auto last = options.folder / "last.safetensors", best = options.folder / "best.safetensors";
  const bool keeps = !options.folder.empty();
  double best_loss = std::numeric_limits<double>::infinity();
  if (keeps) make_folder(options.folder);
  if (keeps && options.resume && is_there(last)) best_loss = load_checkpoint(trainer, last, options.fingerprint);
  std::vector<Matrix<typename Model::Scalar>> best_weights;
  const Index steps = trainer.schedule().steps;
  while (trainer.step_count() < steps) {
    const auto now = batches(trainer.step_count());
    StepReport done;
    done.learning_rate = trainer.schedule()(trainer.step_count() + 1);
    done.result = trainer.step(std::span<const TrainingBatch<Model>>(now));
    done.step = trainer.step_count();
    const bool end = done.step == steps;
    const auto due = [&](Index every) { return end || (every > 0 && done.step % every == 0); };
    if (validate && due(options.validate_every)) {
      done.validation_loss = validate();
      require<NumericError>(std::isfinite(done.validation_loss), "the validation loss after step ", done.step, " is ",
                            done.validation_loss);
      if (done.validation_loss < best_loss) {
        best_loss = done.validation_loss;
        best_weights.clear();
        for_each_parameter(trainer.model(), [&](const std::string&, auto& p) { best_weights.push_back(p.value); });
        if (keeps) save_parameters(trainer.model(), best);
      }
    }
    if (keeps && due(options.checkpoint_every)) save_checkpoint(trainer, last, best_loss, options.fingerprint);
    if (report) report(done);
  }
  if (validate && !best_weights.empty()) {
    std::size_t i = 0;
    for_each_parameter(trainer.model(), [&](const std::string&, auto& p) { p.value = best_weights[i++]; });
  } else if (validate && keeps && std::isfinite(best_loss)) {  // this run's own, from before it was killed
    load_parameters(trainer.model(), SafetensorsFile(best));
  }
  check_weights(trainer);  // what the last update did, no step has met
  return validate && std::isfinite(best_loss) ? best_loss : std::numeric_limits<double>::quiet_NaN();
}

/// The same over a dataset: `accumulate` batches a step, epoch after epoch. States are kept for later epochs until
/// they hold `keep_bytes`; a batch beyond that computes them again, to the same bits.
template <class Model>
class DatasetBatches {
 public:
  DatasetBatches(const PackedDataset& dataset, Index accumulate, std::size_t keep_bytes)
      : dataset_(dataset), accumulate_(accumulate), kept_(static_cast<std::size_t>(dataset.size())),
        keep_bytes_(keep_bytes) {
    require<ConfigError>(accumulate >= 1, "at least one batch a step, found ", accumulate);
  }

  std::vector<TrainingBatch<Model>> operator()(Index step) {
    std::vector<TrainingBatch<Model>> batches;
    std::size_t bytes = kept_bytes();
    const auto missing = static_cast<std::size_t>(std::count(kept_.begin(), kept_.end(), nullptr));
    const std::size_t mean = missing == kept_.size() ? 0 : bytes / (kept_.size() - missing);
    for (Index i = 0; i < accumulate_; ++i) {
      const Index n = dataset_.at(step * accumulate_ + i);
      auto& kept = kept_[static_cast<std::size_t>(n)];
      if (!kept && bytes < keep_bytes_) {
        kept = std::make_unique<KeptStates<Model>>();
        bytes += mean;  // what it will hold, about
      }
      batches.push_back({&dataset_[n], kept.get()});
    }
    return batches;
  }

  /// Calls fn(batch, states) for all states that are kept now: those of batches, or of their pieces.
  template <class Fn>
  void for_each_kept(const Fn& fn) {
    for (std::size_t n = 0; n < kept_.size(); ++n) {
      if (!kept_[n]) continue;
      const PackedBatch& batch = dataset_[static_cast<Index>(n)];
      if (kept_[n]->filled) fn(batch, *kept_[n]);
      for (std::size_t i = 0; i < kept_[n]->pieces.size(); ++i)
        if (kept_[n]->pieces[i].filled) fn(batch.pieces()[i], kept_[n]->pieces[i]);
    }
  }

  /// Bytes of the states that are kept now.
  std::size_t kept_bytes() const {
    std::size_t total = 0;
    for (const auto& kept : kept_)
      if (kept) total += kept->bytes();
    return total;
  }

 private:
  const PackedDataset& dataset_;
  Index accumulate_;
  std::vector<std::unique_ptr<KeptStates<Model>>> kept_;
  std::size_t keep_bytes_;
};

}  // namespace calm::inline CALM_ABI
