// Progress: one line on stderr that says how far long work is, what it measures and how long it will take.
//
//   train  120/600  20 %  loss 0.412  5210 tokens/s  1:05 left
//
// On a terminal the line overwrites itself, at most five times a second; elsewhere a plain line comes every five
// seconds. Results belong on stdout, which this never touches.
#pragma once

#include <calm/core/error.hpp>
#include <calm/evaluate/table.hpp>

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>

namespace calm::inline CALM_ABI {

/// Clock is a policy so that tests need not wait.
template <class Clock>
class BasicProgress {
 public:
  /// `total` steps of which `first` were done before (a run that goes on); a total of 0 is one that nobody knows.
  /// `terminal` says whether `out` is one; without it, stderr is asked.
  explicit BasicProgress(std::string task, Index total = 0, Index first = 0, std::ostream& out = std::cerr,
                         std::optional<bool> terminal = {})
      : task_(std::move(task)), total_(total), first_(first), done_(first), out_(out),
        terminal_(terminal.value_or(&out == &std::cerr && is_terminal())), start_(Clock::now()) {}

  BasicProgress(const BasicProgress&) = delete;
  BasicProgress& operator=(const BasicProgress&) = delete;
  ~BasicProgress() { end_line(); }

  /// `done` steps are done. `describe()` gives the measured fields as text, such as message("loss ", loss); it is
  /// called only when a line is shown.
  template <class Describe>
  requires std::invocable<const Describe&>
  void update(Index done, const Describe& describe) {
    done_ = done;
    const auto now = Clock::now();
    if (shown_ && now - *shown_ < (terminal_ ? std::chrono::milliseconds(200) : std::chrono::milliseconds(5000)))
      return;
    show(now, describe());
  }

  void update(Index done) {
    update(done, [] { return std::string(); });
  }

  /// Shows the last state, with the whole time that was needed, and ends the line.
  void finish(std::string_view fields = {}) {
    finished_ = true;
    show(Clock::now(), fields);
    end_line();
  }

  /// A line of text that stays, above the progress line.
  void note(std::string_view text) {
    if (open_) out_ << "\r\x1b[K";
    out_ << text << '\n';
    open_ = false;
    if (terminal_) shown_.reset();
    out_.flush();
  }

 private:
  using Time = typename Clock::time_point;

  void show(Time now, std::string_view fields) {
    std::string line = task_ + "  " + std::to_string(done_);
    if (total_ > 0) {
      const double share = static_cast<double>(done_) / static_cast<double>(total_);
      line += '/' + std::to_string(total_) + "  " + fixed(std::clamp(100 * share, 0.0, 100.0), 0) + " %";
    }
    if (!fields.empty()) line += "  " + std::string(fields);
    const double seconds = std::chrono::duration<double>(now - start_).count();
    if (finished_) line += "  " + duration(seconds);
    else if (total_ > done_ && done_ > first_)
      line += "  " + duration(seconds * static_cast<double>(total_ - done_) / static_cast<double>(done_ - first_)) +
              " left";
    if (terminal_) out_ << '\r' << shortened(line, columns() - 1) << "\x1b[K";
    else out_ << line << '\n';
    out_.flush();
    open_ = terminal_;
    shown_ = now;
  }

  void end_line() {
    if (open_) out_ << std::endl;
    open_ = false;
  }

  /// 1:05 or 2:03:09.
  static std::string duration(double seconds) {
    const auto whole = static_cast<Index>(std::min(seconds + 0.5, 3.6e9));
    const auto two = [](Index n) { return (n < 10 ? "0" : "") + std::to_string(n); };
    const Index minutes = whole / 60;
    return (minutes < 60 ? std::to_string(minutes) : std::to_string(minutes / 60) + ':' + two(minutes % 60)) + ':' +
           two(whole % 60);
  }

  /// The first `columns` code points: a line that wraps could not be overwritten.
  static std::string shortened(std::string_view line, std::size_t columns) {
    std::size_t end = 0;
    for (std::size_t width = 0; end < line.size(); ++end)
      if ((static_cast<unsigned char>(line[end]) & 0xC0U) != 0x80U && ++width > columns) break;
    return std::string(line.substr(0, end));
  }

  static std::size_t columns() {
    ::winsize size{};
    const bool known = ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1;
    return known ? size.ws_col : 80;
  }

  static bool is_terminal() {
    const char* kind = std::getenv("TERM");
    return ::isatty(STDERR_FILENO) == 1 && !(kind != nullptr && std::string_view(kind) == "dumb");
  }

  std::string task_;
  Index total_, first_, done_;
  std::ostream& out_;
  bool terminal_;
  Time start_;
  std::optional<Time> shown_;
  bool open_ = false, finished_ = false;
};

using Progress = BasicProgress<std::chrono::steady_clock>;

}  // namespace calm::inline CALM_ABI
