# Finds what calm needs. Used by the build of calm and by an installed copy alike.
#
# Each function sets the named variable to an empty string where all is well, else to a sentence that says what is
# missing and which package of Debian holds it.
include_guard(GLOBAL)

# Eigen >= 3.4.0 and < 6. Eigen's own version file refuses a request for "3.4" from version 5 on, so no version is asked.
function(calm_find_eigen problem_variable)
  set(${problem_variable} "" PARENT_SCOPE)
  if(TARGET Eigen3::Eigen)
    return() # the enclosing project chose it
  endif()
  find_package(Eigen3 CONFIG QUIET)
  if(NOT TARGET Eigen3::Eigen)
    set(${problem_variable} "calm needs Eigen 3.4 or later: install the package libeigen3-dev" PARENT_SCOPE)
  elseif(Eigen3_VERSION VERSION_LESS 3.4.0 OR Eigen3_VERSION VERSION_GREATER_EQUAL 6)
    set(${problem_variable}
        "calm needs Eigen >= 3.4.0 and < 6, but ${Eigen3_DIR} holds ${Eigen3_VERSION}: install the package libeigen3-dev or set Eigen3_DIR"
        PARENT_SCOPE)
  endif()
endfunction()

# What calm::io adds: nlohmann-json, and the header of xxHash (used inline, so nothing is linked) as calm::xxhash.
function(calm_find_io_dependencies problem_variable)
  set(${problem_variable} "" PARENT_SCOPE)
  if(NOT TARGET nlohmann_json::nlohmann_json)
    find_package(nlohmann_json 3.10 CONFIG QUIET)
  endif()
  if(NOT TARGET nlohmann_json::nlohmann_json)
    set(${problem_variable} "calm::io needs nlohmann-json 3.10 or later: install the package nlohmann-json3-dev"
        PARENT_SCOPE)
    return()
  endif()
  if(TARGET calm::xxhash)
    return()
  endif()
  find_path(CALM_XXHASH_INCLUDE_DIR xxhash.h DOC "The folder of xxhash.h, version 0.8 or later")
  mark_as_advanced(CALM_XXHASH_INCLUDE_DIR)
  if(NOT CALM_XXHASH_INCLUDE_DIR)
    set(${problem_variable} "calm::io needs xxhash.h 0.8 or later: install the package libxxhash-dev" PARENT_SCOPE)
    return()
  endif()
  file(STRINGS "${CALM_XXHASH_INCLUDE_DIR}/xxhash.h" minor REGEX "#define XXH_VERSION_MINOR +[0-9]+")
  string(REGEX MATCH "[0-9]+$" minor "${minor}")
  if(minor LESS 8)
    set(${problem_variable}
        "calm::io needs xxhash.h 0.8 or later, but ${CALM_XXHASH_INCLUDE_DIR} holds 0.${minor}: install the package libxxhash-dev"
        PARENT_SCOPE)
    return()
  endif()
  add_library(calm::xxhash INTERFACE IMPORTED)
  set_target_properties(calm::xxhash PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${CALM_XXHASH_INCLUDE_DIR}")
endfunction()

# What calm::tokenizer adds: PCRE2 (8-bit) as calm::pcre2 and utf8proc as calm::utf8proc.
function(calm_find_tokenizer_dependencies problem_variable)
  set(${problem_variable} "" PARENT_SCOPE)
  foreach(dependency "pcre2;pcre2.h;pcre2-8;10.34;libpcre2-dev" "utf8proc;utf8proc.h;utf8proc;2.2;libutf8proc-dev")
    list(GET dependency 0 name)
    list(GET dependency 1 header)
    list(GET dependency 2 library)
    list(GET dependency 3 version)
    list(GET dependency 4 package)
    if(TARGET calm::${name})
      continue()
    endif()
    string(TOUPPER ${name} upper)
    find_path(CALM_${upper}_INCLUDE_DIR ${header} DOC "The folder of ${header}, version ${version} or later")
    find_library(CALM_${upper}_LIBRARY ${library} DOC "The library ${library} that belongs to ${header}")
    mark_as_advanced(CALM_${upper}_INCLUDE_DIR CALM_${upper}_LIBRARY)
    if(NOT CALM_${upper}_INCLUDE_DIR OR NOT CALM_${upper}_LIBRARY)
      set(${problem_variable} "calm::tokenizer needs ${header} ${version} or later: install the package ${package}"
          PARENT_SCOPE)
      return()
    endif()
    # "#define PCRE2_MAJOR 10", "#define UTF8PROC_VERSION_MAJOR 2", and the same for MINOR
    file(STRINGS "${CALM_${upper}_INCLUDE_DIR}/${header}" lines REGEX "^#define ${upper}_(VERSION_)?(MAJOR|MINOR) ")
    string(REGEX MATCHALL "(MAJOR|MINOR) +[0-9]+" numbers "${lines}")
    list(TRANSFORM numbers REPLACE "^[A-Z]+ +" "")
    list(JOIN numbers "." found)
    if(found VERSION_LESS version)
      set(${problem_variable}
          "calm::tokenizer needs ${header} ${version} or later, but ${CALM_${upper}_INCLUDE_DIR} holds ${found}: install the package ${package}"
          PARENT_SCOPE)
      return()
    endif()
    add_library(calm::${name} INTERFACE IMPORTED)
    set_target_properties(
      calm::${name} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${CALM_${upper}_INCLUDE_DIR}" INTERFACE_LINK_LIBRARIES
                                                                                           "${CALM_${upper}_LIBRARY}")
  endforeach()
endfunction()

# What calm::onednn adds: oneDNN >= 2.6 and < 4 as calm::dnnl, its version in CALM_DNNL_VERSION. By its files: its own
# package asks for OpenCL where it was built with it, which calm does not use.
function(calm_find_onednn problem_variable)
  set(${problem_variable} "" PARENT_SCOPE)
  if(TARGET calm::dnnl)
    return()
  endif()
  find_path(CALM_DNNL_INCLUDE_DIR dnnl.hpp DOC "The folder of dnnl.hpp, version 2.6 or later")
  find_library(CALM_DNNL_LIBRARY dnnl DOC "The library dnnl that belongs to dnnl.hpp")
  mark_as_advanced(CALM_DNNL_INCLUDE_DIR CALM_DNNL_LIBRARY)
  if(NOT CALM_DNNL_INCLUDE_DIR OR NOT CALM_DNNL_LIBRARY)
    set(${problem_variable} "calm::onednn needs oneDNN 2.6 or later: install the package libdnnl-dev" PARENT_SCOPE)
    return()
  endif()
  # "#define DNNL_VERSION_MAJOR 2", and the same for MINOR
  set(found "of unknown version")
  if(EXISTS "${CALM_DNNL_INCLUDE_DIR}/oneapi/dnnl/dnnl_version.h")
    file(STRINGS "${CALM_DNNL_INCLUDE_DIR}/oneapi/dnnl/dnnl_version.h" lines
         REGEX "^#define DNNL_VERSION_(MAJOR|MINOR) ")
    string(REGEX MATCHALL "(MAJOR|MINOR) +[0-9]+" numbers "${lines}")
    list(TRANSFORM numbers REPLACE "^[A-Z]+ +" "")
    list(JOIN numbers "." found)
  endif()
  if(NOT found MATCHES "^[0-9.]+$" OR found VERSION_LESS 2.6 OR found VERSION_GREATER_EQUAL 4)
    set(${problem_variable}
        "calm::onednn needs oneDNN >= 2.6 and < 4, but ${CALM_DNNL_INCLUDE_DIR} holds ${found}: install the package libdnnl-dev"
        PARENT_SCOPE)
    return()
  endif()
  set(CALM_DNNL_VERSION "${found}" CACHE INTERNAL "The version of oneDNN that was found")
  add_library(calm::dnnl INTERFACE IMPORTED GLOBAL)
  set_target_properties(
    calm::dnnl PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${CALM_DNNL_INCLUDE_DIR}" INTERFACE_LINK_LIBRARIES
                                                                                   "${CALM_DNNL_LIBRARY}")
endfunction()

# calm_define_onednn(TARGET): what a program links to have its default products from oneDNN.
function(calm_define_onednn target)
  target_link_libraries(${target} INTERFACE calm::calm calm::dnnl ${CMAKE_DL_LIBS})
  target_compile_definitions(${target} INTERFACE CALM_WITH_ONEDNN)
endfunction()
