// Link: which block of which augment is tapped, and after which block of the anchor its bridge writes.
#pragma once

#include <calm/core/error.hpp>

#include <algorithm>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

namespace calm::inline CALM_ABI {

/// Blocks are counted from 0; "after block i" is the residual stream that block i leaves.
struct Link {
  Index augment = 0;
  Index tap = 0;    // block of the augment
  Index write = 0;  // block of the anchor

  friend bool operator==(const Link&, const Link&) = default;
};

/// As the command line writes it: augment:tap>write.
inline std::string to_string(const Link& link) { return message(link.augment, ":", link.tap, ">", link.write); }

/// The inverse of to_string, for lists of links that are separated by commas: "0:3>7,0:7>14". Throws ConfigError that
/// names the part; `what` says where the text was given.
inline std::vector<Link> parse_links(const std::string& text, const std::string& what) {
  std::vector<Link> links;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    std::istringstream numbers(part);
    Link link;
    char colon = 0, arrow = 0;
    numbers >> link.augment >> colon >> link.tap >> arrow >> link.write;
    require<ConfigError>(numbers && numbers.peek() == EOF && colon == ':' && arrow == '>', what, ": '", part,
                         "' does not read as augment:tap>write, such as 0:3>7");
    links.push_back(link);
  }
  return links;
}

namespace links {

/// `count` links from every augment, evenly spaced over both models as in the paper (section 3.1).
struct EvenlySpaced {
  Index count = 0;
};

inline EvenlySpaced evenly_spaced(Index count) { return {count}; }

/// The block after which link k of n stands in a model of `blocks` blocks: the last link joins the last blocks.
inline Index evenly_spaced_block(Index k, Index n, Index blocks) { return ((k + 1) * blocks + n - 1) / n - 1; }

}  // namespace links

/// The links of a composition, as a list or as a rule.
class Links {
 public:
  Links(std::vector<Link> list) : list_(std::move(list)) {}  // NOLINT(google-explicit-constructor): reads as a list
  Links(std::initializer_list<Link> list) : list_(list) {}
  Links(links::EvenlySpaced rule) : rule_(rule) {}  // NOLINT(google-explicit-constructor): reads as a rule

  /// The list for an anchor and its augments, checked. Throws ConfigError that names the link.
  std::vector<Link> resolve(Index anchor_blocks, const std::vector<Index>& augment_blocks) const {
    std::vector<Link> result = list_;
    for (const Index blocks : augment_blocks)
      require<ConfigError>(rule_.count <= std::min(blocks, anchor_blocks), "evenly_spaced: ", rule_.count,
                           " links cannot be spread over ", blocks, " blocks of the augment and ", anchor_blocks,
                           " of the anchor");
    for (std::size_t a = 0; a < augment_blocks.size(); ++a)
      for (Index k = 0; k < rule_.count; ++k)
        result.push_back({static_cast<Index>(a), links::evenly_spaced_block(k, rule_.count, augment_blocks[a]),
                          links::evenly_spaced_block(k, rule_.count, anchor_blocks)});
    require<ConfigError>(!result.empty(), "a composition needs at least one link");
    for (std::size_t k = 0; k < result.size(); ++k) check(result, k, anchor_blocks, augment_blocks);
    return result;
  }

 private:
  static void check(const std::vector<Link>& all, std::size_t k, Index anchor_blocks,
                    const std::vector<Index>& augment_blocks) {
    const Link& link = all[k];
    const std::string name = message("link ", k, " (", to_string(link), ")");
    const auto augments = static_cast<Index>(augment_blocks.size());
    require<ConfigError>(link.augment >= 0 && link.augment < augments, name, ": there is no augment ", link.augment,
                         "; they are counted from 0 and there are ", augments);
    const Index blocks = augment_blocks[static_cast<std::size_t>(link.augment)];
    require<ConfigError>(link.tap >= 0 && link.tap < blocks, name, ": augment ", link.augment, " has no block ",
                         link.tap, "; its blocks are 0 to ", blocks - 1);
    require<ConfigError>(link.write >= 0 && link.write < anchor_blocks, name, ": the anchor has no block ", link.write,
                         "; its blocks are 0 to ", anchor_blocks - 1);
    for (std::size_t other = 0; other < k; ++other)
      require<ConfigError>(!(all[other] == link), name, " stands twice (also as link ", other, ")");
  }

  std::vector<Link> list_;
  links::EvenlySpaced rule_;
};

}  // namespace calm::inline CALM_ABI
