// What calm's headers include of others, without calm: the measure of how fast this machine compiles just now.
#include <Eigen/Core>

#include <algorithm>
#include <atomic>
#include <concepts>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

double sum(const Eigen::ArrayXd& values) { return (values.exp() + values.log()).sum(); }

std::string sorted(std::vector<std::string> words) {
  std::sort(words.begin(), words.end());
  std::string text;
  for (const std::string& word : words) text += word + ' ';
  return text;
}
